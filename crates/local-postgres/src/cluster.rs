//! One supervised PostgreSQL server and its data directory.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, Executor};

use crate::Error;
use crate::discover::{self, Installation};
use crate::process::{self, POLL_INTERVAL, Signal, Watchdog};
use crate::server::{self, READY_TIMEOUT, STOP_TIMEOUT, not_ready};
use crate::user::ServerUser;

/// What a [`Cluster`] is started with.
#[derive(Debug, Clone)]
pub struct Options {
    /// Directory of the cluster; created when missing. The server's files, the password and the log
    /// live in it. When the server must run as another user who may not enter this directory, they
    /// are kept below `/var/lib/tenantry` instead; see [`Cluster::data_dir`].
    pub data_dir: PathBuf,
    /// Keeps committed transactions through a crash of the machine. Tests say `false` and gain speed.
    pub durable: bool,
    /// A fixed port, or any free one.
    pub port: Option<u16>,
    /// Further server settings; they win over the built-in ones.
    pub settings: Vec<(String, String)>,
}

impl Options {
    /// A durable cluster on any free port.
    pub fn new(data_dir: impl Into<PathBuf>) -> Self {
        Self {
            data_dir: data_dir.into(),
            durable: true,
            port: None,
            settings: Vec::new(),
        }
    }
}

/// How a server ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Sessions are ended and the data directory is left clean.
    Fast,
    /// Like a crash: nothing is written any more and the next start recovers from the log.
    Immediate,
}

/// A running PostgreSQL server that ends with this value.
///
/// Dropping it ends the server at once; [`Cluster::stop`] ends it cleanly. If the process dies
/// without doing either, a watchdog sends the server a fast shutdown.
#[derive(Debug)]
pub struct Cluster {
    installation: Installation,
    user: ServerUser,
    options: Options,
    /// Where the files really are.
    home: PathBuf,
    password: String,
    port: u16,
    running: Mutex<Running>,
    /// Held for the life of the cluster, so that two processes never supervise one directory.
    _lock: File,
    /// Removes a throw-away directory after everything else is gone.
    _scratch: Option<tempfile::TempDir>,
}

#[derive(Debug)]
struct Running {
    child: Child,
    watchdog: Option<Watchdog>,
}

impl Cluster {
    /// Initialises the directory if it is empty, starts the server and waits until it answers.
    ///
    /// Left-overs of a server that died are cleaned up. Waits for one that is still shutting down.
    ///
    /// # Errors
    /// [`Error::NotFound`] without server binaries, [`Error::AlreadyRunning`] or [`Error::Locked`] when the directory is in use,
    /// [`Error::VersionMismatch`] for data of another major version, [`Error::NotReady`] with the end of the log otherwise.
    pub async fn start(options: Options) -> Result<Self, Error> {
        Self::start_in(options, None).await
    }

    pub(crate) async fn start_in(
        options: Options,
        scratch: Option<tempfile::TempDir>,
    ) -> Result<Self, Error> {
        let user = ServerUser::detect()?;
        let installation = blocking(discover::discover).await?;
        let home = server::prepare_home(user, &options.data_dir)?;
        let lock = server::lock(&home)?;
        let data = home.join("data");
        server::await_previous_server(&data).await?;
        let password = server::password(&home)?;
        if !data.join("PG_VERSION").exists() {
            let (binaries, home, durable) = (installation.clone(), home.clone(), options.durable);
            blocking(move || server::initialise(user, &binaries, &home, durable)).await?;
        }
        server::check_version(&data, &installation)?;
        let (child, port) =
            server::launch(user, &installation, &options, &home, options.port).await?;
        let watchdog = Some(Watchdog::start(child.id(), &data)?);
        let running = Mutex::new(Running { child, watchdog });
        let cluster = Self {
            installation,
            user,
            options,
            home,
            password,
            port,
            running,
            _lock: lock,
            _scratch: scratch,
        };
        cluster.await_answer().await?;
        tracing::info!(port, pid = cluster.pid(), data_dir = %cluster.home.display(), "PostgreSQL is ready");
        Ok(cluster)
    }

    /// The binaries in use.
    pub fn installation(&self) -> &Installation {
        &self.installation
    }

    /// Where the cluster's files are: `data/`, the file `password` and `postgres.log`.
    pub fn data_dir(&self) -> &Path {
        &self.home
    }

    /// The server's log file.
    pub fn log_path(&self) -> PathBuf {
        self.home.join("postgres.log")
    }

    /// The port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Process id of the server.
    pub fn pid(&self) -> u32 {
        self.running().child.id()
    }

    /// True while the server process lives.
    pub fn is_running(&self) -> bool {
        matches!(self.running().child.try_wait(), Ok(None))
    }

    /// Connection URL of a database as the superuser `postgres`. It contains the password.
    pub fn url(&self, database: &str) -> String {
        format!(
            "postgres://postgres:{}@127.0.0.1:{}/{database}",
            self.password, self.port
        )
    }

    /// Creates a database unless it exists, and returns its URL.
    ///
    /// # Errors
    /// [`Error::InvalidName`] unless the name matches `^[a-z][a-z0-9_]{0,62}$`, [`Error::Sql`] otherwise.
    pub async fn create_database(&self, name: &str) -> Result<String, Error> {
        create_database(&self.url("postgres"), name).await?;
        Ok(self.url(name))
    }

    /// Ends the server cleanly; does nothing if it has ended.
    ///
    /// # Errors
    /// [`Error::NotStopped`] if it does not end in time; it is killed then, and recovers at the next start.
    pub async fn stop(&self) -> Result<(), Error> {
        self.end(Mode::Fast).await
    }

    /// Ends the server and starts it again on the same port and data.
    ///
    /// # Errors
    /// Those of [`Cluster::stop`] and [`Cluster::start`].
    pub async fn restart(&self, mode: Mode) -> Result<(), Error> {
        self.end(mode).await?;
        let (child, _) = server::launch(
            self.user,
            &self.installation,
            &self.options,
            &self.home,
            Some(self.port),
        )
        .await?;
        let watchdog = Some(Watchdog::start(child.id(), &self.home.join("data"))?);
        *self.running() = Running { child, watchdog };
        self.await_answer().await
    }

    /// Removes everything that [`Cluster::start`] created for `data_dir`, wherever it is kept.
    ///
    /// # Errors
    /// [`Error::AlreadyRunning`] or [`Error::Locked`] while a server uses it, [`Error::File`] otherwise.
    pub fn remove(data_dir: &Path) -> Result<(), Error> {
        let home = server::effective_home(ServerUser::detect()?, data_dir);
        if home.exists() {
            let _lock = server::lock(&home)?;
            server::refuse_running(&home.join("data"))?;
            std::fs::remove_dir_all(&home).map_err(Error::file("remove", &home))?;
        }
        if data_dir.exists() {
            std::fs::remove_dir_all(data_dir).map_err(Error::file("remove", data_dir))?;
        }
        Ok(())
    }

    /// Hands the server over to whoever watches it next: it no longer ends with this value.
    pub(crate) fn detach(self) {
        self.running().watchdog = None;
        // The destructor would end the server.
        std::mem::forget(self);
    }

    fn running(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn exited(&self) -> Option<ExitStatus> {
        self.running().child.try_wait().ok().flatten()
    }

    /// Waits until the server answers a query, which is later than the port being open.
    async fn await_answer(&self) -> Result<(), Error> {
        let started = Instant::now();
        loop {
            match connect(&self.url("postgres")).await {
                Ok(connection) => {
                    connection.close().await?;
                    return Ok(());
                }
                Err(error) if started.elapsed() > READY_TIMEOUT => {
                    return Err(not_ready(
                        &self.log_path(),
                        format!("does not answer: {error}"),
                    ));
                }
                Err(_) => {}
            }
            if let Some(status) = self.exited() {
                return Err(not_ready(&self.log_path(), format!("ended with {status}")));
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    async fn end(&self, mode: Mode) -> Result<(), Error> {
        let pid = self.pid();
        if self.exited().is_none() {
            process::signal(
                pid,
                if mode == Mode::Fast {
                    Signal::Interrupt
                } else {
                    Signal::Quit
                },
            );
        }
        let started = Instant::now();
        while self.exited().is_none() {
            if started.elapsed() > STOP_TIMEOUT {
                let _ = self.running().child.kill();
                return Err(Error::NotStopped {
                    pid,
                    seconds: STOP_TIMEOUT.as_secs(),
                });
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        self.running().watchdog = None;
        Ok(())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        /// Dropping happens on paths that cannot wait long; a durable server still gets its checkpoint.
        const DROP_TIMEOUT: Duration = Duration::from_secs(10);
        let durable = self.options.durable;
        let mut running = self.running();
        let alive = |child: &mut Child| matches!(child.try_wait(), Ok(None));
        if alive(&mut running.child) {
            process::signal(
                running.child.id(),
                if durable {
                    Signal::Interrupt
                } else {
                    Signal::Quit
                },
            );
            let started = Instant::now();
            while alive(&mut running.child) && started.elapsed() < DROP_TIMEOUT {
                std::thread::sleep(POLL_INTERVAL);
            }
            if alive(&mut running.child) {
                let _ = running.child.kill();
                let _ = running.child.wait();
            }
        }
        running.watchdog = None;
    }
}

/// Creates a database through the superuser's URL unless it exists.
pub(crate) async fn create_database(admin_url: &str, name: &str) -> Result<(), Error> {
    let plain = name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.len() <= 63
        && name
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
    if !plain {
        return Err(Error::InvalidName(name.to_owned()));
    }
    let mut connection = connect(admin_url).await?;
    // `template0` never has sessions that would block the copy. The name was checked above.
    let created = connection
        .execute(AssertSqlSafe(format!(
            "CREATE DATABASE {name} TEMPLATE template0"
        )))
        .await;
    connection.close().await?;
    match created {
        Ok(_) => Ok(()),
        // duplicate_database; unique_violation when two sessions race for the name.
        Err(sqlx::Error::Database(error))
            if matches!(error.code().as_deref(), Some("42P04" | "23505")) =>
        {
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}

/// One plain connection, without a pool.
pub(crate) async fn connect(url: &str) -> Result<PgConnection, sqlx::Error> {
    let options: sqlx::postgres::PgConnectOptions = url.parse()?;
    options
        .ssl_mode(sqlx::postgres::PgSslMode::Disable)
        .disable_statement_logging()
        .connect()
        .await
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}
