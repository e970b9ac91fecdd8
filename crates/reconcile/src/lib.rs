//! How a service follows the registry and drives its part of every tenant towards the spec, on
//! PostgreSQL alone.
//!
//! - [`feed`]: the change feed, written in the writer's transaction, read in commit order without gaps.
//! - [`queue`]: the work queue with leases, fencing tokens and backoff.
//! - [`wake`]: wakes those who wait for either.

#![warn(missing_docs)]

pub mod feed;
pub mod queue;
pub mod wake;

/// Creates and upgrades the schema `reconcile` in a service's own database.
pub static MIGRATOR: sqlx::migrate::Migrator = sqlx::migrate!("./migrations");
