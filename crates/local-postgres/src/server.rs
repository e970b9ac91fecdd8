//! The files of a cluster and the start of its server process: directories, lock, password, `initdb`,
//! port, settings.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use crate::discover::Installation;
use crate::process::{self, POLL_INTERVAL, PidFile, Status};
use crate::user::ServerUser;
use crate::{Error, Options};

/// How long a server may take to accept connections; recovery of a large log counts too.
pub(crate) const READY_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a shutdown may take; a fast shutdown writes a checkpoint.
pub(crate) const STOP_TIMEOUT: Duration = Duration::from_secs(30);
/// How often another free port is tried when somebody takes the chosen one first.
const PORT_ATTEMPTS_MAX: u32 = 5;
/// Characters in the generated superuser password, about 190 bits.
const PASSWORD_LEN: usize = 32;

pub(crate) fn not_ready(log: &Path, what: String) -> Error {
    Error::NotReady {
        what,
        log: log.to_owned(),
        tail: process::tail(log),
    }
}

/// Where the files of `data_dir` live: there, or in a system directory if the server's user may not
/// enter it (a checkout below `/root` is the usual case).
pub(crate) fn effective_home(user: ServerUser, data_dir: &Path) -> PathBuf {
    use std::hash::{DefaultHasher, Hash, Hasher};

    let absolute = std::path::absolute(data_dir).unwrap_or_else(|_| data_dir.to_owned());
    if user.barrier(&absolute.join("data")).is_none() {
        return absolute;
    }
    let mut hasher = DefaultHasher::new();
    absolute.hash(&mut hasher);
    PathBuf::from(format!("/var/lib/tenantry/{:016x}", hasher.finish()))
}

pub(crate) fn prepare_home(user: ServerUser, data_dir: &Path) -> Result<PathBuf, Error> {
    let home = effective_home(user, data_dir);
    let redirected = std::path::absolute(data_dir).is_ok_and(|absolute| absolute != home);
    DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(&home)
        .map_err(Error::file("create", &home))?;
    if user.differs() {
        // Whatever the umask, the server's user must be able to pass through.
        let open = std::fs::Permissions::from_mode(0o711);
        std::fs::set_permissions(&home, open).map_err(Error::file("change the mode of", &home))?;
    }
    if redirected {
        tracing::warn!(
            wanted = %data_dir.display(), used = %home.display(),
            "the unprivileged user that runs PostgreSQL may not enter the data directory, so the data is kept elsewhere"
        );
        std::fs::create_dir_all(data_dir).map_err(Error::file("create", data_dir))?;
        let note = data_dir.join("LOCATION");
        std::fs::write(&note, format!("{}\n", home.display()))
            .map_err(Error::file("write", &note))?;
    }
    Ok(home)
}

pub(crate) fn lock(home: &Path) -> Result<File, Error> {
    let path = home.join("lock");
    let file = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(&path)
        .map_err(Error::file("open", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => {
            refuse_running(&home.join("data"))?;
            Err(Error::Locked(home.to_owned()))
        }
        Err(std::fs::TryLockError::Error(error)) => Err(Error::file("lock", &path)(error)),
    }
}

/// Fails if a live server uses the data directory.
pub(crate) fn refuse_running(data: &Path) -> Result<(), Error> {
    match PidFile::read(data) {
        Some(file) if process::is_postgres(file.pid) => Err(Error::AlreadyRunning {
            pid: file.pid,
            port: file.port,
            data_dir: data.to_owned(),
        }),
        _ => Ok(()),
    }
}

/// Waits for a server that is shutting down, refuses one that runs, and clears what a dead one left.
pub(crate) async fn await_previous_server(data: &Path) -> Result<(), Error> {
    let started = Instant::now();
    while let Some(file) = PidFile::read(data) {
        if !process::is_postgres(file.pid) {
            // PostgreSQL itself refuses to start when the recorded process id has been reused.
            let path = data.join("postmaster.pid");
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(Error::file("remove", &path)(error));
                }
                _ => return Ok(()),
            }
        }
        // The watchdog of an owner that was killed a moment ago has the server stopping soon.
        let patience = if file.status == Status::Stopping {
            STOP_TIMEOUT
        } else {
            Duration::from_secs(2)
        };
        if started.elapsed() > patience {
            return refuse_running(data);
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    Ok(())
}

/// Reads the superuser's password, or makes one.
pub(crate) fn password(home: &Path) -> Result<String, Error> {
    use rand::Rng;
    use rand::distr::Alphanumeric;

    let path = home.join("password");
    if home.join("data/PG_VERSION").exists() {
        let text = std::fs::read_to_string(&path).map_err(Error::file("read", &path))?;
        return Ok(text.trim().to_owned());
    }
    let password: String = rand::rng()
        .sample_iter(Alphanumeric)
        .take(PASSWORD_LEN)
        .map(char::from)
        .collect();
    let mut file = OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(true)
        .mode(0o600)
        .open(&path)
        .map_err(Error::file("create", &path))?;
    file.write_all(password.as_bytes())
        .map_err(Error::file("write", &path))?;
    Ok(password)
}

/// Runs `initdb` in a directory beside the final one, so that an interrupted run leaves nothing that
/// looks like a cluster.
pub(crate) fn initialise(
    user: ServerUser,
    installation: &Installation,
    home: &Path,
    durable: bool,
) -> Result<(), Error> {
    let staging = home.join("initialising");
    if staging.exists() {
        std::fs::remove_dir_all(&staging).map_err(Error::file("remove", &staging))?;
    }
    DirBuilder::new()
        .mode(0o700)
        .create(&staging)
        .map_err(Error::file("create", &staging))?;
    // The server's user reads the password from a copy of its own.
    let password = staging.with_extension("password");
    std::fs::copy(home.join("password"), &password).map_err(Error::file("create", &password))?;
    user.own(&staging)?;
    user.own(&password)?;
    let mut command = user.command(&installation.bin_dir.join("initdb"));
    command
        .args([
            "--username=postgres",
            "--encoding=UTF8",
            "--locale=C",
            "--auth-local=reject",
        ])
        // A cleartext password over loopback costs a debug build of a client nothing, SCRAM's key
        // derivation costs it a tenth of a second per connection; throw-away clusters take the former.
        .arg(if durable {
            "--auth-host=scram-sha-256"
        } else {
            "--auth-host=password"
        })
        .arg("--pwfile")
        .arg(&password)
        .arg("--pgdata")
        .arg(&staging);
    if !durable {
        command.arg("--no-sync");
    }
    let output = command
        .output()
        .map_err(Error::file("run", &installation.bin_dir.join("initdb")));
    let _ = std::fs::remove_file(&password);
    let output = output?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(Error::Program {
            program: "initdb".into(),
            output: text,
        });
    }
    let data = home.join("data");
    std::fs::rename(&staging, &data).map_err(Error::file("create", &data))
}

pub(crate) fn check_version(data: &Path, installation: &Installation) -> Result<(), Error> {
    let path = data.join("PG_VERSION");
    let text = std::fs::read_to_string(&path).map_err(Error::file("read", &path))?;
    match text.trim().parse() {
        Ok(version) if version != installation.major => Err(Error::VersionMismatch {
            data_dir: data.to_owned(),
            data: version,
            server: installation.major,
        }),
        _ => Ok(()),
    }
}

/// Starts the server process and waits until its port is open.
pub(crate) async fn launch(
    user: ServerUser,
    installation: &Installation,
    options: &Options,
    home: &Path,
    port: Option<u16>,
) -> Result<(Child, u16), Error> {
    let log = home.join("postgres.log");
    let mut attempt = 0;
    loop {
        attempt += 1;
        let chosen = match port {
            Some(port) => port,
            None => free_port()?,
        };
        let mut child = spawn(user, installation, options, home, chosen)?;
        match await_port(&mut child, home).await {
            Ok(()) => return Ok((child, chosen)),
            // Somebody took the port between our look and the server's.
            Err(what)
                if port.is_none()
                    && attempt < PORT_ATTEMPTS_MAX
                    && process::tail(&log).contains("could not bind") =>
            {
                tracing::debug!(chosen, what, "trying another port for PostgreSQL");
            }
            Err(what) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(not_ready(&log, what));
            }
        }
    }
}

fn free_port() -> Result<u16, Error> {
    std::net::TcpListener::bind(("127.0.0.1", 0))
        .and_then(|listener| listener.local_addr())
        .map(|address| address.port())
        .map_err(Error::file("bind a port of", Path::new("127.0.0.1")))
}

fn spawn(
    user: ServerUser,
    installation: &Installation,
    options: &Options,
    home: &Path,
    port: u16,
) -> Result<Child, Error> {
    let log_path = home.join("postgres.log");
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(&log_path)
        .map_err(Error::file("open", &log_path))?;
    let log_copy = log.try_clone().map_err(Error::file("open", &log_path))?;
    let program = installation.bin_dir.join("postgres");
    let mut command = user.command(&program);
    command
        .arg("-D")
        .arg(home.join("data"))
        .arg("-p")
        .arg(port.to_string());
    for (name, value) in settings(options) {
        command.arg("-c").arg(format!("{name}={value}"));
    }
    command
        .env("LC_ALL", "C")
        .stdout(Stdio::from(log_copy))
        .stderr(Stdio::from(log))
        // Ctrl-C in a terminal reaches our group; the services must drain before the server goes.
        .process_group(0)
        .spawn()
        .map_err(Error::file("run", &program))
}

fn settings(options: &Options) -> Vec<(String, String)> {
    let mut settings: Vec<(&str, &str)> = vec![
        ("listen_addresses", "127.0.0.1"),
        ("unix_socket_directories", ""),
        ("max_connections", "300"),
        // Dropping many schemas in one transaction takes a lock for each of their tables.
        ("max_locks_per_transaction", "256"),
        ("timezone", "UTC"),
        ("log_timezone", "UTC"),
        ("log_line_prefix", "%m [%p] %d %a "),
    ];
    if cfg!(target_os = "linux") {
        // The default opens every file of every schema before recovery begins.
        settings.push(("recovery_init_sync_method", "syncfs"));
    }
    if !options.durable {
        settings.extend([
            ("fsync", "off"),
            ("synchronous_commit", "off"),
            ("full_page_writes", "off"),
        ]);
    }
    settings
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .chain(options.settings.iter().cloned())
        .collect()
}

/// Waits until the server says that it is ready; on failure tells what happened instead.
async fn await_port(child: &mut Child, home: &Path) -> Result<(), String> {
    let started = Instant::now();
    loop {
        match child.try_wait() {
            Ok(None) => {}
            Ok(Some(status)) => return Err(format!("ended with {status}")),
            Err(error) => return Err(format!("cannot be watched: {error}")),
        }
        let file = PidFile::read(&home.join("data"));
        if file.is_some_and(|file| file.pid == child.id() && file.status == Status::Ready) {
            return Ok(());
        }
        if started.elapsed() > READY_TIMEOUT {
            return Err(format!(
                "was not ready within {} s",
                READY_TIMEOUT.as_secs()
            ));
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}
