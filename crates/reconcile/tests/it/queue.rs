use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use reconcile::queue::{Lease, Queue, Stale};
use sqlx::PgPool;
use uuid::Uuid;

use crate::{database, eventually};

const QUEUE: Queue = Queue::new("work");
const LEASE: Duration = Duration::from_secs(30);
const SHORT: Duration = Duration::from_millis(150);

fn key(number: u128) -> Uuid {
    Uuid::from_u128(number)
}

async fn enqueue(pool: &PgPool, keys: &[Uuid]) {
    let mut tx = pool.begin().await.unwrap();
    QUEUE.enqueue(&mut tx, keys).await.unwrap();
    tx.commit().await.unwrap();
}

async fn claim(pool: &PgPool) -> Option<Lease> {
    QUEUE.claim(pool, "tester", LEASE).await.unwrap()
}

async fn complete(pool: &PgPool, lease: &Lease) -> Result<(), Stale> {
    lease.complete(&mut pool.acquire().await.unwrap()).await
}

#[tokio::test]
async fn many_enqueues_of_a_key_are_one_piece_of_work() {
    let database = database().await;
    let pool = database.pool();
    for _ in 0..50 {
        enqueue(pool, &[key(1), key(1)]).await;
    }
    let lease = claim(pool).await.unwrap();
    assert_eq!((lease.key, lease.attempt), (key(1), 0));
    assert_eq!(claim(pool).await, None);
    complete(pool, &lease).await.unwrap();
    assert_eq!(claim(pool).await, None);
    assert_eq!(QUEUE.next_due(pool).await.unwrap(), None);
}

#[tokio::test]
async fn an_enqueue_that_rolls_back_leaves_no_work() {
    let database = database().await;
    let mut tx = database.pool().begin().await.unwrap();
    QUEUE.enqueue(&mut tx, &[key(1)]).await.unwrap();
    tx.rollback().await.unwrap();
    assert_eq!(claim(database.pool()).await, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn racing_workers_never_hold_one_key_together_and_every_key_is_worked_on() {
    const KEYS: u128 = 20;
    let database = database().await;
    let keys: Vec<Uuid> = (0..KEYS).map(key).collect();
    enqueue(database.pool(), &keys).await;
    let holders: Arc<Vec<AtomicUsize>> = Arc::new((0..KEYS).map(|_| AtomicUsize::new(0)).collect());
    let passes = Arc::new(AtomicUsize::new(0));
    let workers: Vec<_> = (0..6)
        .map(|worker| {
            let (pool, holders, passes) = (
                database.pool().clone(),
                Arc::clone(&holders),
                Arc::clone(&passes),
            );
            tokio::spawn(async move {
                while let Some(lease) = QUEUE
                    .claim(&pool, &worker.to_string(), LEASE)
                    .await
                    .unwrap()
                {
                    let holder = &holders[usize::try_from(lease.key.as_u128()).unwrap()];
                    assert_eq!(
                        holder.fetch_add(1, Ordering::SeqCst),
                        0,
                        "two workers hold {}",
                        lease.key
                    );
                    if passes.fetch_add(1, Ordering::SeqCst) < 100 {
                        // Comes again while it is held.
                        enqueue(&pool, &[lease.key]).await;
                    }
                    tokio::task::yield_now().await;
                    holder.fetch_sub(1, Ordering::SeqCst);
                    complete(&pool, &lease).await.unwrap();
                }
            })
        })
        .collect();
    for worker in workers {
        worker.await.unwrap();
    }
    assert!(passes.load(Ordering::SeqCst) >= 100 + 20 - 6, "{passes:?}");
    assert_eq!(claim(database.pool()).await, None);
}

#[tokio::test]
async fn a_frozen_worker_cannot_commit_after_its_lease_has_ended() {
    let database = database().await;
    let pool = database.pool();
    enqueue(pool, &[key(1)]).await;
    let frozen = QUEUE.claim(pool, "frozen", SHORT).await.unwrap().unwrap();
    let successor = eventually("another worker takes over", || claim(pool)).await;
    assert_eq!(successor.key, frozen.key);
    assert!(successor.token > frozen.token);
    assert_eq!(
        successor.attempt, 1,
        "a lease that ends by itself counts as a failure"
    );

    let mut tx = pool.begin().await.unwrap();
    assert!(matches!(frozen.fence(&mut tx).await, Err(Stale::Lost)));
    tx.rollback().await.unwrap();
    assert!(matches!(frozen.renew(pool, LEASE).await, Err(Stale::Lost)));
    assert!(matches!(complete(pool, &frozen).await, Err(Stale::Lost)));
    successor
        .fence(&mut pool.acquire().await.unwrap())
        .await
        .unwrap();
    complete(pool, &successor).await.unwrap();
}

#[tokio::test]
async fn a_fenced_transaction_keeps_the_key_although_its_lease_ends_before_the_commit() {
    let database = database().await;
    let pool = database.pool();
    enqueue(pool, &[key(1)]).await;
    let lease = QUEUE.claim(pool, "slow", SHORT).await.unwrap().unwrap();
    let mut tx = pool.begin().await.unwrap();
    lease.fence(&mut tx).await.unwrap();
    tokio::time::sleep(SHORT * 2).await;
    assert_eq!(
        claim(pool).await,
        None,
        "nobody may take the key while the effect can still commit"
    );
    // Neither the worker nor those who enqueue wait for each other.
    tokio::time::timeout(Duration::from_secs(5), enqueue(pool, &[key(1)]))
        .await
        .expect("enqueue waits for the worker");
    assert_eq!(claim(pool).await, None);
    tx.commit().await.unwrap();
    assert!(claim(pool).await.is_some());
}

#[tokio::test]
async fn a_renewed_lease_outlives_its_first_end() {
    let database = database().await;
    let pool = database.pool();
    enqueue(pool, &[key(1)]).await;
    let lease = QUEUE.claim(pool, "renewing", SHORT).await.unwrap().unwrap();
    lease.renew(pool, LEASE).await.unwrap();
    tokio::time::sleep(SHORT * 2).await;
    assert_eq!(claim(pool).await, None);
    lease
        .fence(&mut pool.acquire().await.unwrap())
        .await
        .unwrap();
}

#[tokio::test]
async fn a_key_enqueued_while_it_is_worked_on_runs_again_however_the_work_ends() {
    let database = database().await;
    let pool = database.pool();
    for ending in 0..4 {
        enqueue(pool, &[key(1)]).await;
        let lease = claim(pool).await.unwrap();
        enqueue(pool, &[key(1)]).await;
        assert_eq!(claim(pool).await, None);
        let mut conn = pool.acquire().await.unwrap();
        match ending {
            0 => lease.complete(&mut conn).await.unwrap(),
            1 => lease.retry(&mut conn).await.map(drop).unwrap(),
            2 => lease.park(&mut conn).await.unwrap(),
            _ => lease.again_after(&mut conn, LEASE).await.unwrap(),
        }
        let again = claim(pool).await.unwrap();
        assert_eq!(again.attempt, 0);
        complete(pool, &again).await.unwrap();
        assert_eq!(claim(pool).await, None);
    }
}

#[tokio::test]
async fn failures_pause_and_count_until_success_or_the_next_enqueue() {
    let database = database().await;
    let pool = database.pool();
    enqueue(pool, &[key(1)]).await;
    for attempt in 0..3 {
        let lease = eventually("the pause ends", || claim(pool)).await;
        assert_eq!(lease.attempt, attempt);
        let pause = lease
            .retry(&mut pool.acquire().await.unwrap())
            .await
            .unwrap();
        let due = QUEUE.next_due(pool).await.unwrap().unwrap();
        assert!(due <= pause, "{due:?} {pause:?}");
    }
    let lease = eventually("the pause ends", || claim(pool)).await;
    lease
        .again_after(&mut pool.acquire().await.unwrap(), LEASE)
        .await
        .unwrap();
    assert_eq!(claim(pool).await, None);
    enqueue(pool, &[key(1)]).await;
    assert_eq!(
        claim(pool).await.unwrap().attempt,
        0,
        "waiting work is due at once when it is enqueued"
    );
}

#[tokio::test]
async fn parked_work_rests_until_it_is_enqueued_again() {
    let database = database().await;
    let pool = database.pool();
    enqueue(pool, &[key(1)]).await;
    let lease = claim(pool).await.unwrap();
    lease
        .park(&mut pool.acquire().await.unwrap())
        .await
        .unwrap();
    assert_eq!(QUEUE.next_due(pool).await.unwrap(), None);
    assert_eq!(
        QUEUE
            .resync(&mut pool.acquire().await.unwrap(), Duration::ZERO, 10)
            .await
            .unwrap(),
        0
    );
    enqueue(pool, &[key(1)]).await;
    assert_eq!(claim(pool).await.unwrap().attempt, 0);
}

#[tokio::test]
async fn the_rotation_makes_the_keys_due_that_rested_for_longest() {
    let database = database().await;
    let pool = database.pool();
    enqueue(pool, &[key(1), key(2), key(3)]).await;
    for _ in 0..3 {
        let lease = claim(pool).await.unwrap();
        complete(pool, &lease).await.unwrap();
    }
    let mut conn = pool.acquire().await.unwrap();
    assert_eq!(QUEUE.resync(&mut conn, LEASE, 10).await.unwrap(), 0);
    assert_eq!(QUEUE.resync(&mut conn, Duration::ZERO, 2).await.unwrap(), 2);
    assert!(claim(pool).await.is_some());
    assert!(claim(pool).await.is_some());
    assert_eq!(claim(pool).await, None);
}

#[tokio::test]
async fn a_forgotten_key_that_returns_never_reuses_a_token() {
    let database = database().await;
    let pool = database.pool();
    enqueue(pool, &[key(1)]).await;
    let old = claim(pool).await.unwrap();
    QUEUE
        .forget(&mut pool.acquire().await.unwrap(), &[key(1)])
        .await
        .unwrap();
    assert!(matches!(
        old.fence(&mut pool.acquire().await.unwrap()).await,
        Err(Stale::Lost)
    ));
    enqueue(pool, &[key(1)]).await;
    assert!(claim(pool).await.unwrap().token > old.token);
    assert!(matches!(
        old.fence(&mut pool.acquire().await.unwrap()).await,
        Err(Stale::Lost)
    ));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn enqueues_of_many_keys_in_any_order_do_not_deadlock() {
    let database = database().await;
    let writers: Vec<_> = (0..4)
        .map(|writer| {
            let pool = database.pool().clone();
            tokio::spawn(async move {
                for _ in 0..20 {
                    let mut keys: Vec<Uuid> = (0..30).map(key).collect();
                    if writer % 2 == 0 {
                        keys.reverse();
                    }
                    enqueue(&pool, &keys).await;
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
}

/// The body of the process that the next test kills: it claims a key, writes its effect without
/// committing it, and holds on until it dies.
#[tokio::test]
async fn claims_and_holds_when_asked_to() {
    let Ok(url) = std::env::var("RECONCILE_TEST_HOLD") else {
        return;
    };
    let pool = PgPool::connect(&url).await.unwrap();
    let lease = QUEUE
        .claim(&pool, "doomed", Duration::from_secs(1))
        .await
        .unwrap()
        .unwrap();
    let mut tx = pool.begin().await.unwrap();
    lease.fence(&mut tx).await.unwrap();
    sqlx::query("INSERT INTO effect (token) VALUES ($1)")
        .bind(lease.token)
        .execute(&mut *tx)
        .await
        .unwrap();
    // A committed sign of life beside the open transaction.
    sqlx::query("INSERT INTO alive (token) VALUES ($1)")
        .bind(lease.token)
        .execute(&pool)
        .await
        .unwrap();
    std::future::pending::<()>().await;
}

#[tokio::test]
async fn a_worker_killed_with_its_effect_half_done_is_replaced_and_the_effect_happens_once() {
    let database = database().await;
    let pool = database.pool();
    sqlx::raw_sql("CREATE TABLE effect (token bigint); CREATE TABLE alive (token bigint)")
        .execute(pool)
        .await
        .unwrap();
    enqueue(pool, &[key(1)]).await;
    let mut doomed = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "queue::claims_and_holds_when_asked_to"])
        .env("RECONCILE_TEST_HOLD", database.url())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let first: i64 = eventually("the worker holds the key", || async {
        sqlx::query_scalar("SELECT token FROM alive")
            .fetch_optional(pool)
            .await
            .unwrap()
    })
    .await;
    assert_eq!(claim(pool).await, None);
    // SIGKILL: nothing of the worker's own code runs any more.
    doomed.kill().unwrap();
    doomed.wait().unwrap();

    let lease = eventually("the lease of the dead worker ends", || claim(pool)).await;
    assert!(lease.token > first);
    let mut tx = pool.begin().await.unwrap();
    lease.fence(&mut tx).await.unwrap();
    sqlx::query("INSERT INTO effect (token) VALUES ($1)")
        .bind(lease.token)
        .execute(&mut *tx)
        .await
        .unwrap();
    lease.complete(&mut tx).await.unwrap();
    tx.commit().await.unwrap();

    let effects: Vec<i64> = sqlx::query_scalar("SELECT token FROM effect")
        .fetch_all(pool)
        .await
        .unwrap();
    assert_eq!(effects, [lease.token]);
    assert_eq!(claim(pool).await, None);
}
