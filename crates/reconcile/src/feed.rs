//! The change feed: what changed, in the order of commits, without gaps.
//!
//! A writer appends to the feed in the transaction that makes the change, as its **last** statement.
//! Appending increments the topic's counter row, whose lock PostgreSQL holds until the commit is
//! visible. So versions are handed out one transaction at a time, a version that is visible is never
//! followed later by a smaller one, and a rolled-back transaction leaves no gap. A reader that has seen
//! version `n` has seen everything up to `n`. The price is that commits of one topic queue up behind
//! each other, for the time between the append and the commit; nothing else in the cluster, however
//! long its transactions, delays readers, as a snapshot horizon would.
//!
//! NOTIFY only wakes readers ([`crate::wake::Waker`]); the table is the truth.
//!
//! A reader starts with [`Feed::head`] and a snapshot of the data, both read in **one** `REPEATABLE READ`
//! transaction, and goes on with [`Feed::read_after`].

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use chrono::{DateTime, Utc};
use sqlx::postgres::types::PgInterval;
use sqlx::{PgConnection, Row};
use uuid::Uuid;

/// The NOTIFY channel of all feeds; the payload is the topic.
pub const CHANNEL: &str = "reconcile_feed";

/// Entries are kept at least this long, so that a reader may be away for a day.
pub const RETENTION_MIN: Duration = Duration::from_secs(24 * 3600);

/// How many entries one statement of [`Feed::compact`] removes, to keep its transaction short.
const COMPACT_BATCH_ENTRIES: i64 = 5_000;

/// One change to append.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The thing that changed; changes of one key keep their order.
    pub key: Uuid,
    /// What readers get.
    pub payload: Vec<u8>,
}

/// One change as read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Place in the topic's history: 1, 2, 3 and so on without gaps.
    pub version: i64,
    /// The thing that changed.
    pub key: Uuid,
    /// What the writer wrote.
    pub payload: Vec<u8>,
    /// When it was written, by the database's clock.
    pub created_at: DateTime<Utc>,
}

/// A place in a topic's history. Its text form is the resume token: opaque, safe in URLs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Position {
    /// Which history: it changes when a database was restored from a backup.
    pub epoch: Uuid,
    /// The last version seen; 0 for the beginning.
    pub version: i64,
}

/// First byte of a resume token, so that its layout can change.
const TOKEN_LAYOUT: u8 = 1;
const TOKEN_LEN: usize = 1 + 16 + 8;

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = Vec::with_capacity(TOKEN_LEN);
        bytes.push(TOKEN_LAYOUT);
        bytes.extend_from_slice(self.epoch.as_bytes());
        bytes.extend_from_slice(&self.version.to_be_bytes());
        f.write_str(&BASE64_URL_SAFE_NO_PAD.encode(bytes))
    }
}

/// A resume token that no feed has issued.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a resume token")]
pub struct InvalidToken;

impl FromStr for Position {
    type Err = InvalidToken;

    fn from_str(text: &str) -> Result<Self, InvalidToken> {
        let bytes = BASE64_URL_SAFE_NO_PAD
            .decode(text)
            .map_err(|_| InvalidToken)?;
        let bytes: [u8; TOKEN_LEN] = bytes.try_into().map_err(|_| InvalidToken)?;
        let (layout, rest) = bytes.split_at(1);
        let (epoch, version) = rest.split_at(16);
        let epoch = Uuid::from_slice(epoch).map_err(|_| InvalidToken)?;
        let version = i64::from_be_bytes(version.try_into().map_err(|_| InvalidToken)?);
        if layout != [TOKEN_LAYOUT] || version < 0 {
            return Err(InvalidToken);
        }
        Ok(Self { epoch, version })
    }
}

/// Why a feed cannot be read from a position.
#[derive(Debug, thiserror::Error)]
pub enum FeedError {
    /// The entries after the position are gone, or the position belongs to another history. Read a
    /// snapshot and start again from its position.
    #[error("the resume token is too old or belongs to another history")]
    TooOld,
    /// The database failed.
    #[error("cannot read the feed")]
    Sql(#[from] sqlx::Error),
}

/// One topic's history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Feed {
    topic: &'static str,
}

impl Feed {
    /// Names a topic; it comes into being with its first use.
    pub const fn new(topic: &'static str) -> Self {
        Self { topic }
    }

    /// The topic's name.
    pub const fn topic(&self) -> &'static str {
        self.topic
    }

    /// Appends changes in order and returns the version of the last one.
    ///
    /// Call it as the last statement of the transaction: until its commit, every other writer of the
    /// topic waits. Without changes it does nothing and returns the current version.
    ///
    /// # Errors
    /// Those of the database. Under `REPEATABLE READ` or stricter a concurrent writer causes a
    /// serialization failure (40001): run the transaction again.
    pub async fn append(
        &self,
        tx: &mut PgConnection,
        changes: &[Change],
    ) -> Result<i64, sqlx::Error> {
        if changes.is_empty() {
            return Ok(self.head(tx).await?.version);
        }
        let keys: Vec<Uuid> = changes.iter().map(|change| change.key).collect();
        let payloads: Vec<&[u8]> = changes
            .iter()
            .map(|change| change.payload.as_slice())
            .collect();
        let added = i64::try_from(changes.len()).unwrap_or(i64::MAX);
        sqlx::query_scalar(
            "WITH head AS (
                 INSERT INTO reconcile.feed_head AS head (topic, version) VALUES ($1, $2)
                 ON CONFLICT (topic) DO UPDATE SET version = head.version + excluded.version
                 RETURNING version
             ), added AS (
                 INSERT INTO reconcile.feed (topic, version, key, payload)
                 SELECT $1, head.version - $2 + change.ordinal, change.key, change.payload
                 FROM head, unnest($3::uuid[], $4::bytea[]) WITH ORDINALITY AS change (key, payload, ordinal)
             )
             SELECT head.version FROM head, pg_notify($5, $1)",
        )
        .bind(self.topic)
        .bind(added)
        .bind(keys)
        .bind(payloads)
        .bind(CHANNEL)
        .fetch_one(tx)
        .await
    }

    /// The end of the history.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn head(&self, conn: &mut PgConnection) -> Result<Position, sqlx::Error> {
        let head = "SELECT epoch, version FROM reconcile.feed_head WHERE topic = $1";
        if let Some(row) = sqlx::query(head)
            .bind(self.topic)
            .fetch_optional(&mut *conn)
            .await?
        {
            return position(&row);
        }
        // The epoch must be fixed before the first position is handed out. If somebody else is first,
        // the update that changes nothing returns their row, which our snapshot may not show.
        let row = sqlx::query(
            "INSERT INTO reconcile.feed_head AS head (topic) VALUES ($1)
             ON CONFLICT (topic) DO UPDATE SET version = head.version
             RETURNING epoch, version",
        )
        .bind(self.topic)
        .fetch_one(conn)
        .await?;
        position(&row)
    }

    /// At most `limit` entries after a position, in order; empty at the end of the history.
    ///
    /// # Errors
    /// [`FeedError::TooOld`] if entries after the position were removed, or the position is of another
    /// epoch or beyond the end (a database restored without a new epoch).
    pub async fn read_after(
        &self,
        conn: &mut PgConnection,
        after: &Position,
        limit: i64,
    ) -> Result<Vec<Entry>, FeedError> {
        // One statement, one snapshot: the head, the floor and the entries belong together.
        let rows = sqlx::query(
            "SELECT head.epoch, head.version AS head_version, coalesce(floor.version, 0) AS floor_version,
                    entry.version, entry.key, entry.payload, entry.created_at
             FROM reconcile.feed_head AS head
             LEFT JOIN reconcile.feed_floor AS floor ON floor.topic = head.topic
             LEFT JOIN LATERAL (
                 SELECT version, key, payload, created_at FROM reconcile.feed
                 WHERE topic = head.topic AND version > $2 ORDER BY version LIMIT $3
             ) AS entry ON true
             WHERE head.topic = $1
             ORDER BY entry.version",
        )
        .bind(self.topic)
        .bind(after.version)
        .bind(limit)
        .fetch_all(conn)
        .await?;
        let Some(first) = rows.first() else {
            return Err(FeedError::TooOld);
        };
        let known = first.try_get::<Uuid, _>("epoch")? == after.epoch
            && after.version >= first.try_get::<i64, _>("floor_version")?
            && after.version <= first.try_get::<i64, _>("head_version")?;
        if !known {
            return Err(FeedError::TooOld);
        }
        let mut entries = Vec::with_capacity(rows.len());
        for row in &rows {
            // The outer join gives one row without an entry at the end of the history.
            let Some(version) = row.try_get::<Option<i64>, _>("version")? else {
                break;
            };
            entries.push(Entry {
                version,
                key: row.try_get("key")?,
                payload: row.try_get("payload")?,
                created_at: row.try_get("created_at")?,
            });
        }
        Ok(entries)
    }

    /// Removes entries older than `keep`, at least [`RETENTION_MIN`], and returns how many. Readers
    /// that were away for longer get [`FeedError::TooOld`]. Writers are not held up.
    ///
    /// # Errors
    /// Those of the database; what was removed until then stays removed.
    pub async fn compact(&self, pool: &sqlx::PgPool, keep: Duration) -> Result<u64, sqlx::Error> {
        let mut removed = 0;
        loop {
            let mut tx = pool.begin().await?;
            let batch = self.compact_batch(&mut tx, keep.max(RETENTION_MIN)).await?;
            tx.commit().await?;
            removed += batch;
            if batch < COMPACT_BATCH_ENTRIES.unsigned_abs() {
                return Ok(removed);
            }
        }
    }

    async fn compact_batch(
        &self,
        tx: &mut PgConnection,
        keep: Duration,
    ) -> Result<u64, sqlx::Error> {
        // Only a prefix may go: the first young entry ends it.
        let removed: i64 = sqlx::query_scalar(
            "WITH oldest AS (
                 SELECT version, created_at FROM reconcile.feed
                 WHERE topic = $1 ORDER BY version LIMIT $3
             ), old AS (
                 SELECT max(version) AS version FROM oldest
                 WHERE version < coalesce(
                     (SELECT min(version) FROM oldest WHERE created_at >= clock_timestamp() - $2),
                     9223372036854775807)
             ), raised AS (
                 INSERT INTO reconcile.feed_floor AS floor (topic, version)
                 SELECT $1, version FROM old WHERE version IS NOT NULL
                 ON CONFLICT (topic) DO UPDATE SET version = greatest(floor.version, excluded.version)
             ), removed AS (
                 DELETE FROM reconcile.feed USING old
                 WHERE feed.topic = $1 AND feed.version <= old.version
                 RETURNING 1
             )
             SELECT count(*) FROM removed",
        )
        .bind(self.topic)
        .bind(interval(keep))
        .bind(COMPACT_BATCH_ENTRIES)
        .fetch_one(tx)
        .await?;
        Ok(removed.unsigned_abs())
    }

    /// Starts a new history for readers: every position handed out so far becomes too old. Run it after
    /// the database was restored from a backup.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn renew_epoch(&self, conn: &mut PgConnection) -> Result<Position, sqlx::Error> {
        self.head(&mut *conn).await?;
        let row = sqlx::query(
            "WITH renewed AS (
                 UPDATE reconcile.feed_head SET epoch = gen_random_uuid() WHERE topic = $1
                 RETURNING epoch, version
             )
             SELECT epoch, version FROM renewed, pg_notify($2, $1)",
        )
        .bind(self.topic)
        .bind(CHANNEL)
        .fetch_one(conn)
        .await?;
        position(&row)
    }
}

fn position(row: &sqlx::postgres::PgRow) -> Result<Position, sqlx::Error> {
    Ok(Position {
        epoch: row.try_get("epoch")?,
        version: row.try_get("version")?,
    })
}

/// A duration as an SQL interval, in whole microseconds.
pub(crate) fn interval(duration: Duration) -> PgInterval {
    PgInterval {
        months: 0,
        days: 0,
        microseconds: i64::try_from(duration.as_micros()).unwrap_or(i64::MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_survives_its_text_form() {
        for version in [0, 1, 4_711, i64::MAX] {
            let position = Position {
                epoch: Uuid::from_u128(0x1234_5678),
                version,
            };
            assert_eq!(position.to_string().parse(), Ok(position));
        }
    }

    #[test]
    fn what_is_not_a_token_is_refused() {
        let token = Position {
            epoch: Uuid::nil(),
            version: 7,
        }
        .to_string();
        let other_layout = BASE64_URL_SAFE_NO_PAD.encode([2_u8; TOKEN_LEN]);
        let negative = BASE64_URL_SAFE_NO_PAD.encode([&[1_u8][..], &[0; 16], &[255; 8]].concat());
        for text in [
            "",
            "x",
            "tenants/acme",
            &token[1..],
            &format!("{token}AA"),
            &other_layout,
            &negative,
        ] {
            assert_eq!(text.parse::<Position>(), Err(InvalidToken), "{text}");
        }
    }
}
