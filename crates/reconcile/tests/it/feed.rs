use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use local_postgres::testing::TestDatabase;
use proptest::prelude::*;
use reconcile::feed::{Change, Entry, Feed, FeedError, Position, RETENTION_MIN};
use reconcile::wake::Waker;
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use crate::{DEADLINE, database, eventually};

const FEED: Feed = Feed::new("things");

fn change(key: u128, payload: impl Into<Vec<u8>>) -> Change {
    Change {
        key: Uuid::from_u128(key),
        payload: payload.into(),
    }
}

async fn append(pool: &PgPool, changes: &[Change]) -> i64 {
    let mut tx = pool.begin().await.unwrap();
    let version = FEED.append(&mut tx, changes).await.unwrap();
    tx.commit().await.unwrap();
    version
}

async fn head(database: &TestDatabase) -> Position {
    FEED.head(&mut database.pool().acquire().await.unwrap())
        .await
        .unwrap()
}

async fn read(
    database: &TestDatabase,
    after: Position,
    limit: i64,
) -> Result<Vec<Entry>, FeedError> {
    FEED.read_after(&mut database.pool().acquire().await.unwrap(), &after, limit)
        .await
}

/// Follows the feed until it has seen `total` entries, looking all the time.
async fn follow(pool: PgPool, start: Position, total: usize) -> Vec<Entry> {
    let mut seen: Vec<Entry> = Vec::new();
    let mut position = start;
    while seen.len() < total {
        let mut conn = pool.acquire().await.unwrap();
        let entries = FEED.read_after(&mut conn, &position, 7).await.unwrap();
        drop(conn);
        if let Some(last) = entries.last() {
            position.version = last.version;
        } else {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        seen.extend(entries);
    }
    seen
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_writers_and_a_delayed_commit_never_make_a_reader_skip_repeat_or_reorder() {
    const WRITERS: usize = 8;
    const COMMITS: usize = 25;
    let database = database().await;
    let start = head(&database).await;
    let pool = database.pool().clone();

    // Writes first, commits late: readers must not see what comes after it before it.
    let slow_appended = Arc::new(tokio::sync::Notify::new());
    let slow = tokio::spawn({
        let (pool, appended) = (pool.clone(), Arc::clone(&slow_appended));
        async move {
            let mut tx = pool.begin().await.unwrap();
            let version = FEED.append(&mut tx, &[change(99, "slow")]).await.unwrap();
            appended.notify_one();
            tokio::time::sleep(Duration::from_millis(300)).await;
            tx.commit().await.unwrap();
            version
        }
    });
    slow_appended.notified().await;
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let pool = pool.clone();
            tokio::spawn(async move {
                for number in 0..COMMITS {
                    let mut tx = pool.begin().await.unwrap();
                    FEED.append(&mut tx, &[change(writer as u128, number.to_string())])
                        .await
                        .unwrap();
                    // Every fifth transaction fails after its append: no version may be lost by it.
                    if number % 5 == 4 {
                        tx.rollback().await.unwrap();
                        append(&pool, &[change(writer as u128, number.to_string())]).await;
                    } else {
                        tx.commit().await.unwrap();
                    }
                }
            })
        })
        .collect();
    let total = WRITERS * COMMITS + 1;
    let readers: Vec<_> = (0..3)
        .map(|_| tokio::spawn(follow(pool.clone(), start, total)))
        .collect();

    assert_eq!(slow.await.unwrap(), 1);
    for writer in writers {
        writer.await.unwrap();
    }
    for reader in readers {
        let seen = tokio::time::timeout(DEADLINE, reader)
            .await
            .unwrap()
            .unwrap();
        let versions: Vec<i64> = seen.iter().map(|entry| entry.version).collect();
        assert_eq!(versions, (1..=total as i64).collect::<Vec<_>>());
        let mut by_key: HashMap<Uuid, Vec<String>> = HashMap::new();
        for entry in seen {
            by_key
                .entry(entry.key)
                .or_default()
                .push(String::from_utf8(entry.payload).unwrap());
        }
        assert_eq!(by_key.remove(&Uuid::from_u128(99)).unwrap(), ["slow"]);
        let expected: Vec<String> = (0..COMMITS).map(|number| number.to_string()).collect();
        assert_eq!(by_key.len(), WRITERS);
        assert!(by_key.values().all(|numbers| *numbers == expected));
    }
}

#[tokio::test]
async fn resuming_at_every_version_with_every_page_size_gives_the_rest_of_the_history() {
    let database = database().await;
    let start = head(&database).await;
    for (number, size) in [1_usize, 3, 2, 1, 5].into_iter().enumerate() {
        let changes: Vec<Change> = (0..size)
            .map(|part| change(part as u128, format!("{number}.{part}")))
            .collect();
        append(database.pool(), &changes).await;
    }
    let full = read(&database, start, 100).await.unwrap();
    assert_eq!(full.len(), 12);
    for version in 0..=12_i64 {
        for limit in [1, 2, 5, 100] {
            // Through the text form, as a client would.
            let mut position: Position = Position { version, ..start }.to_string().parse().unwrap();
            let mut rest = Vec::new();
            loop {
                let page = read(&database, position, limit).await.unwrap();
                let Some(last) = page.last() else { break };
                position.version = last.version;
                rest.extend(page);
            }
            assert_eq!(
                rest,
                full[usize::try_from(version).unwrap()..],
                "after {version} by {limit}"
            );
        }
    }
}

#[test]
fn any_history_of_commits_and_rollbacks_is_read_back_as_committed() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let database = runtime.block_on(database());
    let transactions = prop::collection::vec(
        (
            prop::collection::vec((0..4_u128, any::<[u8; 2]>()), 0..4),
            any::<bool>(),
        ),
        1..12,
    );
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 24,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    runner
        .run(&transactions, |transactions| {
            runtime.block_on(async {
                let start = head(&database).await;
                let mut expected = Vec::new();
                for (changes, commit) in transactions {
                    let changes: Vec<Change> = changes
                        .into_iter()
                        .map(|(key, payload)| change(key, payload))
                        .collect();
                    let mut tx = database.pool().begin().await.unwrap();
                    FEED.append(&mut tx, &changes).await.unwrap();
                    if commit {
                        tx.commit().await.unwrap();
                        expected.extend(changes);
                    } else {
                        tx.rollback().await.unwrap();
                    }
                }
                let seen = read(&database, start, 1_000).await.unwrap();
                let versions: Vec<i64> = seen.iter().map(|entry| entry.version).collect();
                prop_assert_eq!(
                    versions,
                    (1..=expected.len() as i64)
                        .map(|n| start.version + n)
                        .collect::<Vec<_>>()
                );
                let seen: Vec<Change> = seen
                    .into_iter()
                    .map(|entry| Change {
                        key: entry.key,
                        payload: entry.payload,
                    })
                    .collect();
                prop_assert_eq!(seen, expected);
                Ok(())
            })
        })
        .unwrap();
}

#[tokio::test]
async fn old_entries_go_and_a_reader_that_needs_them_is_told() {
    let database = database().await;
    let start = head(&database).await;
    for number in 1..=6_u8 {
        append(database.pool(), &[change(1, [number])]).await;
    }
    // Version 5 is old too, but 4 in front of it is young: only a prefix may go.
    let age = "UPDATE reconcile.feed SET created_at = created_at - interval '25 hours' WHERE version IN (1, 2, 3, 5)";
    sqlx::query(age).execute(database.pool()).await.unwrap();

    assert_eq!(
        FEED.compact(database.pool(), Duration::ZERO).await.unwrap(),
        3,
        "less than a day is never removed"
    );
    assert_eq!(
        FEED.compact(database.pool(), RETENTION_MIN).await.unwrap(),
        0
    );
    for version in 0..3 {
        let answer = read(&database, Position { version, ..start }, 10).await;
        assert!(matches!(answer, Err(FeedError::TooOld)), "{version}");
    }
    for version in 3..=6_i64 {
        let rest = read(&database, Position { version, ..start }, 10)
            .await
            .unwrap();
        assert_eq!(rest.len(), usize::try_from(6 - version).unwrap());
    }
    assert_eq!(
        append(database.pool(), &[change(1, "next")]).await,
        7,
        "versions go on where they were"
    );
}

#[tokio::test]
async fn retention_does_not_hold_up_writers() {
    let database = database().await;
    append(database.pool(), &[change(1, "old"), change(2, "young")]).await;
    let age =
        "UPDATE reconcile.feed SET created_at = created_at - interval '2 days' WHERE version = 1";
    sqlx::query(age).execute(database.pool()).await.unwrap();
    let mut open = database.pool().begin().await.unwrap();
    FEED.append(&mut open, &[change(3, "open")]).await.unwrap();
    let compacted = tokio::time::timeout(
        Duration::from_secs(5),
        FEED.compact(database.pool(), RETENTION_MIN),
    )
    .await;
    assert_eq!(compacted.expect("waits for an open writer").unwrap(), 1);
    open.commit().await.unwrap();
}

#[tokio::test]
async fn a_new_epoch_and_a_position_beyond_the_end_are_too_old() {
    let database = database().await;
    append(database.pool(), &[change(1, "a"), change(1, "b")]).await;
    let before = head(&database).await;
    let beyond = Position {
        version: before.version + 1,
        ..before
    };
    assert!(matches!(
        read(&database, beyond, 10).await,
        Err(FeedError::TooOld)
    ));

    let renewed = FEED
        .renew_epoch(&mut database.pool().acquire().await.unwrap())
        .await
        .unwrap();
    assert_eq!(renewed.version, before.version);
    assert_ne!(renewed.epoch, before.epoch);
    assert!(matches!(
        read(&database, before, 10).await,
        Err(FeedError::TooOld)
    ));
    assert!(read(&database, renewed, 10).await.unwrap().is_empty());
}

#[tokio::test]
async fn topics_do_not_mix() {
    const OTHER: Feed = Feed::new("others");
    let database = database().await;
    append(database.pool(), &[change(1, "mine")]).await;
    let mut conn = database.pool().acquire().await.unwrap();
    let other = OTHER.head(&mut conn).await.unwrap();
    assert_eq!(other.version, 0);
    assert!(
        OTHER
            .read_after(&mut conn, &other, 10)
            .await
            .unwrap()
            .is_empty()
    );
    let mine = FEED.head(&mut conn).await.unwrap();
    assert!(matches!(
        OTHER.read_after(&mut conn, &mine, 10).await,
        Err(FeedError::TooOld)
    ));
}

#[tokio::test]
async fn a_snapshot_and_the_entries_after_its_position_are_complete() {
    let database = database().await;
    sqlx::query("CREATE TABLE thing (n int)")
        .execute(database.pool())
        .await
        .unwrap();
    let writing = Arc::new(AtomicBool::new(true));
    let writer = tokio::spawn({
        let (pool, writing) = (database.pool().clone(), Arc::clone(&writing));
        async move {
            let mut n = 0_i32;
            while writing.load(Ordering::Relaxed) {
                let mut tx = pool.begin().await.unwrap();
                sqlx::query("INSERT INTO thing VALUES ($1)")
                    .bind(n)
                    .execute(&mut *tx)
                    .await
                    .unwrap();
                FEED.append(&mut tx, &[change(1, n.to_string())])
                    .await
                    .unwrap();
                tx.commit().await.unwrap();
                n += 1;
            }
            n
        }
    });
    let mut snapshots = Vec::new();
    for _ in 0..20 {
        let mut tx = database.pool().begin().await.unwrap();
        sqlx::query("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            .execute(&mut *tx)
            .await
            .unwrap();
        let position = FEED.head(&mut tx).await.unwrap();
        let count: i64 = sqlx::query_scalar("SELECT count(*) FROM thing")
            .fetch_one(&mut *tx)
            .await
            .unwrap();
        tx.commit().await.unwrap();
        snapshots.push((position, count));
    }
    writing.store(false, Ordering::Relaxed);
    let total = writer.await.unwrap();
    for (position, count) in snapshots {
        let rest = read(&database, position, 100_000).await.unwrap();
        assert_eq!(count + rest.len() as i64, i64::from(total));
    }
}

#[tokio::test]
async fn a_commit_wakes_waiters_and_so_does_a_restart_of_the_database() {
    let cluster = local_postgres::testing::private_cluster().await;
    let url = cluster.create_database("woken").await.unwrap();
    let pool = PgPool::connect(&url).await.unwrap();
    sqlx::raw_sql("CREATE SCHEMA IF NOT EXISTS reconcile")
        .execute(&pool)
        .await
        .unwrap();
    reconcile::MIGRATOR.run(&pool).await.unwrap();
    let (tasks, shutdown) = (TaskTracker::new(), CancellationToken::new());
    let waker = Waker::start(&pool, &tasks, shutdown.clone());
    let mut waiter = waker.waiter();
    // Once when the listener has connected.
    tokio::time::timeout(Duration::from_secs(5), waiter.changed())
        .await
        .unwrap();

    append(&pool, &[change(1, "a")]).await;
    tokio::time::timeout(Duration::from_secs(2), waiter.changed())
        .await
        .expect("a commit did not wake the waiter");

    cluster
        .restart(local_postgres::Mode::Immediate)
        .await
        .unwrap();
    tokio::time::timeout(Duration::from_secs(8), waiter.changed())
        .await
        .expect("reconnecting did not wake the waiter");
    eventually("the pool has reconnected", || async {
        pool.acquire().await.ok().map(drop)
    })
    .await;
    append(&pool, &[change(1, "b")]).await;
    tokio::time::timeout(Duration::from_secs(5), waiter.changed())
        .await
        .expect("a later commit did not wake the waiter");

    shutdown.cancel();
    tasks.close();
    tokio::time::timeout(Duration::from_secs(5), tasks.wait())
        .await
        .expect("the listener does not end");
}
