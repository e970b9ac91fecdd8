//! Server processes: signals, liveness and the lock file that PostgreSQL keeps in its data directory.
//!
//! Signals go through `kill` of the shell: the standard library can only send SIGKILL.

use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use crate::Error;

/// How often a state that PostgreSQL does not announce is looked at.
pub(crate) const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// A signal with a meaning for the PostgreSQL postmaster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Signal {
    /// Fast shutdown: sessions end, the data directory is left clean.
    Interrupt,
    /// Immediate shutdown: like a crash, the next start recovers from the log.
    Quit,
}

/// Sends a signal; a process that is already gone is not an error.
pub(crate) fn signal(pid: u32, signal: Signal) {
    let name = match signal {
        Signal::Interrupt => "INT",
        Signal::Quit => "QUIT",
    };
    let sent = Command::new("sh")
        .args([
            "-c",
            "kill -s \"$1\" \"$2\" 2>/dev/null",
            "sh",
            name,
            &pid.to_string(),
        ])
        .stdin(Stdio::null())
        .status();
    if let Err(error) = sent {
        tracing::warn!(pid, %error, "cannot send a signal to the PostgreSQL server");
    }
}

/// Tells whether `pid` is a live PostgreSQL process. A recycled process id of another program, or
/// a dead process that nobody has reaped, is not one.
pub(crate) fn is_postgres(pid: u32) -> bool {
    let parse = |name: &str, state: Option<char>| {
        let program = name.rsplit('/').next().unwrap_or(name);
        (program.starts_with("postgres") || program.starts_with("postmaster")) && state != Some('Z')
    };
    match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => match stat
            .split_once('(')
            .and_then(|(_, rest)| rest.rsplit_once(')'))
        {
            Some((name, rest)) => parse(name, rest.trim_start().chars().next()),
            None => false,
        },
        Err(_) if Path::new("/proc/self/stat").exists() => false,
        Err(_) => {
            let output = Command::new("ps")
                .args(["-o", "state=,comm=", "-p", &pid.to_string()])
                .stdin(Stdio::null())
                .output();
            output.is_ok_and(|output| {
                let line = String::from_utf8_lossy(&output.stdout).trim().to_owned();
                line.split_once(char::is_whitespace)
                    .is_some_and(|(state, name)| parse(name.trim(), state.chars().next()))
            })
        }
    }
}

/// The parts of `postmaster.pid` that matter here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PidFile {
    pub(crate) pid: u32,
    /// 0 until the server has chosen its port.
    pub(crate) port: u16,
    pub(crate) status: Status,
}

/// What the server says about itself in `postmaster.pid`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    Starting,
    Ready,
    Stopping,
}

impl PidFile {
    /// Reads the file of a data directory; `None` if there is none or it is still being written.
    pub(crate) fn read(data: &Path) -> Option<Self> {
        // Lines: pid, data directory, start time, port, socket directory, listen address, shared memory key, status.
        let text = std::fs::read_to_string(data.join("postmaster.pid")).ok()?;
        let mut lines = text.lines();
        let pid = lines.next()?.trim().parse().ok()?;
        let port = lines
            .nth(2)
            .and_then(|line| line.trim().parse().ok())
            .unwrap_or(0);
        let status = match lines.nth(3).map(str::trim) {
            Some("ready") => Status::Ready,
            Some("stopping") => Status::Stopping,
            _ => Status::Starting,
        };
        Some(Self { pid, port, status })
    }
}

/// A shell that sends the server a fast shutdown as soon as this process is gone, however it ends:
/// it waits on a pipe whose other end only this process holds.
#[derive(Debug)]
pub(crate) struct Watchdog {
    child: Child,
    pipe: Option<ChildStdin>,
}

const WATCHDOG: &str = r#"
if read -r order && [ "$order" = released ]; then exit 0; fi
if [ "$(head -n 1 "$2/postmaster.pid" 2>/dev/null)" = "$1" ]; then kill -s INT "$1"; fi
"#;

impl Watchdog {
    pub(crate) fn start(pid: u32, data: &Path) -> Result<Self, Error> {
        use std::os::unix::process::CommandExt;

        let mut child = Command::new("sh")
            .args(["-c", WATCHDOG, "sh", &pid.to_string()])
            .arg(data)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // Ctrl-C in a terminal reaches the whole foreground group; the watchdog must survive it.
            .process_group(0)
            .spawn()
            .map_err(Error::file("start", Path::new("sh")))?;
        let pipe = child.stdin.take();
        Ok(Self { child, pipe })
    }
}

impl Drop for Watchdog {
    /// Releases the server: whoever drops the watchdog has ended the server or hands it on.
    fn drop(&mut self) {
        use std::io::Write;

        if let Some(mut pipe) = self.pipe.take() {
            let _ = pipe.write_all(b"released\n");
        }
        let _ = self.child.wait();
    }
}

/// The last lines of a file, for error messages.
pub(crate) fn tail(path: &Path) -> String {
    const LINES_MAX: usize = 15;
    let text = std::fs::read(path)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LINES_MAX)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_file_is_read_at_every_stage_of_its_life() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(PidFile::read(dir.path()), None);
        let write = |text: &str| std::fs::write(dir.path().join("postmaster.pid"), text).unwrap();
        write("");
        assert_eq!(PidFile::read(dir.path()), None);
        write("4711\n/data\n");
        assert_eq!(
            PidFile::read(dir.path()),
            Some(PidFile {
                pid: 4711,
                port: 0,
                status: Status::Starting
            })
        );
        write("4711\n/data\n1700000000\n5433\n\n127.0.0.1\n  12 34\nready   \n");
        assert_eq!(
            PidFile::read(dir.path()),
            Some(PidFile {
                pid: 4711,
                port: 5433,
                status: Status::Ready
            })
        );
        write("4711\n/data\n1700000000\n5433\n\n127.0.0.1\n  12 34\nstopping\n");
        assert_eq!(
            PidFile::read(dir.path()).map(|file| file.status),
            Some(Status::Stopping)
        );
    }

    #[test]
    fn another_program_with_a_recycled_process_id_is_not_postgres() {
        assert!(!is_postgres(std::process::id()));
        assert!(!is_postgres(u32::MAX));
    }
}
