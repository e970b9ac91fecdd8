//! Waking those who wait for a feed or a queue.
//!
//! A wake-up is a hint: it may come for nothing, and it may be lost while the database is away. So every
//! waiter also looks at the table after a long interval, and reconnecting wakes everybody.

use std::time::Duration;

use sqlx::PgPool;
use sqlx::postgres::{PgListener, PgPoolOptions};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::{feed, queue};

/// How often a waiter looks although nobody woke it.
pub const POLL_INTERVAL: Duration = Duration::from_secs(10);
/// Pause before connecting to a lost database again.
const RECONNECT_PAUSE: Duration = Duration::from_millis(500);

/// Wakes the waiters of one database: one LISTEN connection for any number of them.
#[derive(Debug, Clone)]
pub struct Waker {
    wakes: watch::Sender<u64>,
}

impl Waker {
    /// Listens for commits that append to a feed or enqueue work, on a connection of its own beside
    /// the pool, until `shutdown`.
    pub fn start(pool: &PgPool, tasks: &TaskTracker, shutdown: CancellationToken) -> Self {
        let waker = Self::local();
        let wakes = waker.wakes.clone();
        let options = (*pool.connect_options()).clone();
        tasks.spawn(async move {
            let listening = listen(options, wakes);
            shutdown.run_until_cancelled(listening).await;
        });
        waker
    }

    /// A waker without a database: only [`Waker::wake`] and the interval wake its waiters.
    pub fn local() -> Self {
        Self {
            wakes: watch::Sender::new(0),
        }
    }

    /// Wakes all waiters of this process at once, sooner than the database's notification does.
    pub fn wake(&self) {
        self.wakes
            .send_modify(|count| *count = count.wrapping_add(1));
    }

    /// A new waiter. Wake-ups after this call are not lost to it.
    pub fn waiter(&self) -> Waiter {
        Waiter {
            wakes: self.wakes.subscribe(),
            interval: POLL_INTERVAL,
        }
    }
}

/// One who waits. Look at the table first, then call [`Waiter::changed`]: a wake-up between the two is
/// remembered.
#[derive(Debug, Clone)]
pub struct Waiter {
    wakes: watch::Receiver<u64>,
    interval: Duration,
}

impl Waiter {
    /// Returns after a wake-up that came since the last call, or after the long interval.
    pub async fn changed(&mut self) {
        self.changed_within(self.interval).await;
    }

    /// Like [`Waiter::changed`], but waits for at most `limit` if that is shorter.
    pub async fn changed_within(&mut self, limit: Duration) {
        let limit = limit.min(self.interval);
        if let Ok(Err(_closed)) = tokio::time::timeout(limit, self.wakes.changed()).await {
            // Nobody can wake us any more; the interval still holds.
            tokio::time::sleep(limit).await;
        }
    }
}

/// Forwards notifications for ever.
async fn listen(options: sqlx::postgres::PgConnectOptions, wakes: watch::Sender<u64>) {
    // A pool of one, so that the listener neither takes a connection from the service nor is recycled.
    let pool = PgPoolOptions::new()
        .max_connections(1)
        .max_lifetime(None)
        .idle_timeout(None)
        .connect_lazy_with(options);
    loop {
        if let Err(error) = forward(&pool, &wakes).await {
            tracing::warn!(%error, "lost the connection that listens for changes");
        }
        tokio::time::sleep(RECONNECT_PAUSE).await;
    }
}

async fn forward(pool: &PgPool, wakes: &watch::Sender<u64>) -> Result<(), sqlx::Error> {
    let mut listener = PgListener::connect_with(pool).await?;
    listener.listen_all([feed::CHANNEL, queue::CHANNEL]).await?;
    loop {
        // Also right after connecting: what happened before was not heard.
        wakes.send_modify(|count| *count = count.wrapping_add(1));
        if listener.try_recv().await?.is_none() {
            return Ok(());
        }
        // Many commits, one wake-up.
        while listener.next_buffered().is_some() {}
    }
}
