//! The work queue: level-triggered, leased, fenced.
//!
//! A key stands for "look at this thing and make it so", however many changes asked for it. A worker
//! claims a key under a **lease**; a worker that dies or freezes loses it when the lease ends, and
//! another takes over. Each claim draws a new **fencing token**, and a worker calls [`Lease::fence`] first in
//! every transaction that has an effect: the transaction fails if the lease is lost, and as long as it
//! is open nobody else can claim the key. An enqueue never waits for a worker, nor a worker for it.
//!
//! All times are the database's, so replicas need no common clock.

use std::time::Duration;

use sqlx::{PgConnection, PgPool, Row};
use uuid::Uuid;

use crate::feed::interval;

/// The NOTIFY channel of all queues; the payload is the queue's name.
pub const CHANNEL: &str = "reconcile_queue";

/// First pause after a failure, before jitter.
const BACKOFF_BASE: Duration = Duration::from_millis(250);
/// Longest pause after a failure, before jitter.
pub const BACKOFF_MAX: Duration = Duration::from_secs(60);

/// One queue of a database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Queue {
    name: &'static str,
}

/// The lease is no longer held: it ended, or somebody else took the key.
#[derive(Debug, thiserror::Error)]
pub enum Stale {
    /// Another worker may have the key; roll back and do nothing more.
    #[error("the lease on this work was lost")]
    Lost,
    /// The database failed.
    #[error("cannot check the lease")]
    Sql(#[from] sqlx::Error),
}

/// The right to work on a key until the lease ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    queue: &'static str,
    /// What to work on.
    pub key: Uuid,
    /// Larger than the token of every earlier claim of any key; hand it to systems that can fence by it.
    pub token: i64,
    /// How often work on this key failed since it last succeeded or was enqueued; 0 the first time.
    pub attempt: u32,
}

impl Queue {
    /// Names a queue.
    pub const fn new(name: &'static str) -> Self {
        Self { name }
    }

    /// The queue's name.
    pub const fn name(&self) -> &'static str {
        self.name
    }

    /// Asks for work on keys, as soon as the transaction commits. Work that is running will run once
    /// more; waiting, backing-off and parked work becomes due now and forgets its failures.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn enqueue(&self, tx: &mut PgConnection, keys: &[Uuid]) -> Result<(), sqlx::Error> {
        if keys.is_empty() {
            return Ok(());
        }
        // One order for all writers, or two of them deadlock.
        let mut keys = keys.to_vec();
        keys.sort_unstable();
        keys.dedup();
        sqlx::query(
            "WITH added AS (
                 INSERT INTO reconcile.queue AS work (queue, key, due_at)
                 SELECT $1, key, clock_timestamp() FROM unnest($2::uuid[]) AS key
                 ON CONFLICT (queue, key) DO UPDATE SET
                     wanted = work.wanted + 1,
                     attempt = 0,
                     parked = false,
                     due_at = CASE WHEN work.lease_until IS NULL
                         THEN least(work.due_at, excluded.due_at) ELSE work.due_at END
             )
             SELECT pg_notify($3, $1)",
        )
        .bind(self.name)
        .bind(keys)
        .bind(CHANNEL)
        .execute(tx)
        .await?;
        Ok(())
    }

    /// Claims the key that has been due for longest, if any, for the length of `lease`.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn claim(
        &self,
        pool: &PgPool,
        worker: &str,
        lease: Duration,
    ) -> Result<Option<Lease>, sqlx::Error> {
        // FOR UPDATE conflicts with the key-share lock of a fenced transaction, so a key whose worker is
        // committing right now is skipped even if its lease has just ended.
        let row = sqlx::query(
            "WITH due AS MATERIALIZED (
                 SELECT queue, key FROM reconcile.queue
                 WHERE queue = $1 AND due_at <= clock_timestamp()
                 ORDER BY due_at LIMIT 1
                 FOR UPDATE SKIP LOCKED
             )
             UPDATE reconcile.queue AS work SET
                 taken = work.wanted,
                 -- A lease that ended by itself counts as a failure: its worker died over this key.
                 attempt = work.attempt + (work.lease_until IS NOT NULL)::integer,
                 token = nextval('reconcile.fencing_token'),
                 worker = $2,
                 lease_until = clock_timestamp() + $3,
                 due_at = clock_timestamp() + $3
             FROM due WHERE work.queue = due.queue AND work.key = due.key
             RETURNING work.key, work.token, work.attempt",
        )
        .bind(self.name)
        .bind(worker)
        .bind(interval(lease))
        .fetch_optional(pool)
        .await?;
        row.map(|row| {
            Ok(Lease {
                queue: self.name,
                key: row.try_get("key")?,
                token: row.try_get("token")?,
                attempt: row.try_get::<i32, _>("attempt")?.unsigned_abs(),
            })
        })
        .transpose()
    }

    /// How long until the next key becomes due; zero if one is, `None` if there is nothing to wait for.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn next_due(&self, pool: &PgPool) -> Result<Option<Duration>, sqlx::Error> {
        let microseconds: Option<i64> = sqlx::query_scalar(
            "SELECT (extract(epoch FROM min(due_at) - clock_timestamp()) * 1000000)::bigint
             FROM reconcile.queue WHERE queue = $1 AND due_at IS NOT NULL",
        )
        .bind(self.name)
        .fetch_one(pool)
        .await?;
        Ok(microseconds.map(|wait| Duration::from_micros(u64::try_from(wait).unwrap_or(0))))
    }

    /// Makes up to `limit` keys due whose work ended more than `age` ago, and returns how many: the slow
    /// rotation that repairs drift. Keys that wait, run or are parked are left alone.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn resync(
        &self,
        conn: &mut PgConnection,
        age: Duration,
        limit: i64,
    ) -> Result<u64, sqlx::Error> {
        let woken: i64 = sqlx::query_scalar(
            "WITH idle AS MATERIALIZED (
                 SELECT queue, key FROM reconcile.queue
                 WHERE queue = $1 AND due_at IS NULL AND NOT parked AND finished_at < clock_timestamp() - $2
                 ORDER BY finished_at LIMIT $3
                 FOR NO KEY UPDATE SKIP LOCKED
             ), woken AS (
                 UPDATE reconcile.queue AS work SET wanted = work.wanted + 1, due_at = clock_timestamp()
                 FROM idle WHERE work.queue = idle.queue AND work.key = idle.key
                 RETURNING 1
             )
             SELECT count(*) FROM woken, pg_notify($4, $1)",
        )
        .bind(self.name)
        .bind(interval(age))
        .bind(limit)
        .bind(CHANNEL)
        .fetch_one(conn)
        .await?;
        Ok(woken.unsigned_abs())
    }

    /// Forgets keys altogether; a worker that still has one loses its lease.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn forget(&self, tx: &mut PgConnection, keys: &[Uuid]) -> Result<(), sqlx::Error> {
        sqlx::query("DELETE FROM reconcile.queue WHERE queue = $1 AND key = ANY($2)")
            .bind(self.name)
            .bind(keys)
            .execute(tx)
            .await?;
        Ok(())
    }
}

impl Lease {
    /// Proves, for the rest of the transaction, that the lease is held. Call it before the first effect
    /// of every transaction of a worker.
    ///
    /// # Errors
    /// [`Stale::Lost`] if it is not.
    pub async fn fence(&self, conn: &mut PgConnection) -> Result<(), Stale> {
        // A key-share lock keeps others from claiming the key but lets them enqueue it.
        let held = sqlx::query(
            "SELECT 1 FROM reconcile.queue
             WHERE queue = $1 AND key = $2 AND token = $3 AND lease_until > clock_timestamp()
             FOR KEY SHARE",
        )
        .bind(self.queue)
        .bind(self.key)
        .bind(self.token)
        .fetch_optional(conn)
        .await?;
        held.map(drop).ok_or(Stale::Lost)
    }

    /// Extends the lease to `lease` from now.
    ///
    /// # Errors
    /// [`Stale::Lost`] if it is no longer held.
    pub async fn renew(&self, pool: &PgPool, lease: Duration) -> Result<(), Stale> {
        let renewed = sqlx::query(
            "UPDATE reconcile.queue SET lease_until = clock_timestamp() + $4, due_at = clock_timestamp() + $4
             WHERE queue = $1 AND key = $2 AND token = $3 AND lease_until > clock_timestamp()",
        )
        .bind(self.queue)
        .bind(self.key)
        .bind(self.token)
        .bind(interval(lease))
        .execute(pool)
        .await?;
        held(renewed.rows_affected())
    }

    /// Ends the work with success. If the key was enqueued meanwhile it is due again at once.
    ///
    /// # Errors
    /// [`Stale::Lost`] if the lease is no longer held; the work will be done again.
    pub async fn complete(&self, tx: &mut PgConnection) -> Result<(), Stale> {
        self.end(tx, Ending::Complete).await
    }

    /// Ends the work without success and tries again after a pause that doubles with each failure, with
    /// full jitter; at once if the key was enqueued meanwhile. Returns the pause.
    ///
    /// # Errors
    /// [`Stale::Lost`] if the lease is no longer held.
    pub async fn retry(&self, tx: &mut PgConnection) -> Result<Duration, Stale> {
        let pause = backoff(self.attempt);
        self.end(
            tx,
            Ending::Retry {
                pause,
                failed: true,
            },
        )
        .await?;
        Ok(pause)
    }

    /// Ends the work for now, to look again after `pause`: waiting for something is not a failure.
    ///
    /// # Errors
    /// [`Stale::Lost`] if the lease is no longer held.
    pub async fn again_after(&self, tx: &mut PgConnection, pause: Duration) -> Result<(), Stale> {
        self.end(
            tx,
            Ending::Retry {
                pause,
                failed: false,
            },
        )
        .await
    }

    /// Ends the work with a failure that no retry can mend: it rests until the next enqueue, which may
    /// already have come.
    ///
    /// # Errors
    /// [`Stale::Lost`] if the lease is no longer held.
    pub async fn park(&self, tx: &mut PgConnection) -> Result<(), Stale> {
        self.end(tx, Ending::Park).await
    }

    async fn end(&self, tx: &mut PgConnection, ending: Ending) -> Result<(), Stale> {
        let (pause, attempt, parked) = match ending {
            Ending::Complete => (None, 0, false),
            Ending::Retry { pause, failed } => (
                Some(pause),
                if failed {
                    self.attempt.saturating_add(1)
                } else {
                    0
                },
                false,
            ),
            Ending::Park => (None, self.attempt.saturating_add(1), true),
        };
        let ended = sqlx::query(
            "UPDATE reconcile.queue SET
                 due_at = CASE WHEN wanted > taken THEN clock_timestamp() ELSE clock_timestamp() + $4 END,
                 attempt = CASE WHEN wanted > taken THEN 0 ELSE $5 END,
                 parked = wanted = taken AND $6,
                 worker = NULL, lease_until = NULL, finished_at = clock_timestamp()
             WHERE queue = $1 AND key = $2 AND token = $3 AND lease_until > clock_timestamp()",
        )
        .bind(self.queue)
        .bind(self.key)
        .bind(self.token)
        .bind(pause.map(interval))
        .bind(i32::try_from(attempt).unwrap_or(i32::MAX))
        .bind(parked)
        .execute(tx)
        .await?;
        held(ended.rows_affected())
    }
}

enum Ending {
    Complete,
    Retry { pause: Duration, failed: bool },
    Park,
}

fn held(rows: u64) -> Result<(), Stale> {
    if rows == 1 { Ok(()) } else { Err(Stale::Lost) }
}

/// The pause after the given number of earlier failures: uniform between zero and a limit that doubles.
/// Spreading over the whole range keeps many keys that fail together from returning together.
fn backoff(attempt: u32) -> Duration {
    use rand::Rng;

    rand::rng().random_range(Duration::ZERO..=backoff_limit(attempt))
}

fn backoff_limit(attempt: u32) -> Duration {
    BACKOFF_BASE
        .saturating_mul(2_u32.saturating_pow(attempt))
        .min(BACKOFF_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_limit_and_are_spread() {
        assert_eq!(backoff_limit(0), BACKOFF_BASE);
        assert_eq!(backoff_limit(3), BACKOFF_BASE * 8);
        assert_eq!(backoff_limit(8), BACKOFF_MAX);
        assert_eq!(backoff_limit(u32::MAX), BACKOFF_MAX);
        let pauses: Vec<Duration> = (0..100).map(|_| backoff(4)).collect();
        assert!(pauses.iter().all(|pause| *pause <= BACKOFF_BASE * 16));
        assert!(pauses.iter().any(|pause| *pause < BACKOFF_BASE * 4));
        assert!(pauses.iter().any(|pause| *pause > BACKOFF_BASE * 12));
    }
}
