//! The feed, the queue and the reconcile loop on a real PostgreSQL.

#![allow(
    clippy::unwrap_used,
    reason = "a failed step of a test is a failed test, in helpers too"
)]

mod feed;
mod queue;

use std::time::{Duration, Instant};

use local_postgres::testing::TestDatabase;

/// How long anything may take before a test fails.
const DEADLINE: Duration = Duration::from_secs(20);

/// A fresh database with the crate's schema.
async fn database() -> TestDatabase {
    let database = local_postgres::testing::database().await;
    let mut migrator =
        sqlx::migrate::Migrator::with_migrations(reconcile::MIGRATOR.iter().cloned().collect());
    migrator.dangerous_set_table_name("reconcile_migrations");
    migrator.run(database.pool()).await.unwrap();
    database
}

/// Polls until the answer is `Some`, or fails the test.
async fn eventually<T, F: Future<Output = Option<T>>>(
    what: &str,
    mut attempt: impl FnMut() -> F,
) -> T {
    let started = Instant::now();
    loop {
        if let Some(answer) = attempt().await {
            return answer;
        }
        assert!(
            started.elapsed() < DEADLINE,
            "timed out waiting until {what}"
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
