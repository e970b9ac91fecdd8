//! The operating-system user that the server runs as.

use std::os::unix::fs::{MetadataExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::Error;

/// Identity given to the server's processes; `None` in [`ServerUser::drop_to`] keeps our own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ServerUser {
    drop_to: Option<(u32, u32)>,
    uid: u32,
}

impl ServerUser {
    /// Decides who runs the server: ourselves, or an unprivileged user when we are root.
    pub(crate) fn detect() -> Result<Self, Error> {
        let uid = id(&["-u"])?;
        if uid != 0 {
            return Ok(Self { drop_to: None, uid });
        }
        for name in ["postgres", "nobody"] {
            if let (Ok(uid), Ok(gid)) = (id(&["-u", name]), id(&["-g", name])) {
                return Ok(Self {
                    drop_to: Some((uid, gid)),
                    uid,
                });
            }
        }
        Err(Error::Program {
            program: "id".into(),
            output:
                "running as root, and neither user postgres nor nobody exists to run the server"
                    .into(),
        })
    }

    /// User id of the server's processes.
    pub(crate) fn uid(self) -> u32 {
        self.uid
    }

    /// True when the server runs as somebody else than this process.
    pub(crate) fn differs(self) -> bool {
        self.drop_to.is_some()
    }

    /// A command that runs as this user. The standard library drops the supplementary groups too.
    pub(crate) fn command(self, program: &Path) -> Command {
        use std::os::unix::process::CommandExt;

        let mut command = Command::new(program);
        command.stdin(Stdio::null());
        if let Some((uid, gid)) = self.drop_to {
            // The caller's directory and home may be closed to this user.
            command.uid(uid).gid(gid).current_dir("/").env("HOME", "/");
        }
        command
    }

    /// Gives `path` to this user.
    pub(crate) fn own(self, path: &Path) -> Result<(), Error> {
        match self.drop_to {
            Some((uid, gid)) => {
                chown(path, Some(uid), Some(gid)).map_err(Error::file("change the owner of", path))
            }
            None => Ok(()),
        }
    }

    /// The first existing ancestor of `path` that this user may not pass through, if any.
    pub(crate) fn barrier(self, path: &Path) -> Option<PathBuf> {
        let (uid, gid) = self.drop_to?;
        let absolute = std::path::absolute(path).ok()?;
        let mut ancestors: Vec<&Path> = absolute.ancestors().skip(1).collect();
        ancestors.reverse();
        for ancestor in ancestors {
            let Ok(metadata) = std::fs::metadata(ancestor) else {
                break;
            };
            let execute = match () {
                () if metadata.uid() == uid => 0o100,
                () if metadata.gid() == gid => 0o010,
                () => 0o001,
            };
            if metadata.mode() & execute == 0 {
                return Some(ancestor.to_owned());
            }
        }
        None
    }
}

/// Runs `id` with the given arguments and parses the number it prints.
fn id(arguments: &[&str]) -> Result<u32, Error> {
    let failed = |output: String| Error::Program {
        program: "id".into(),
        output,
    };
    let output = Command::new("id")
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| failed(error.to_string()))?;
    String::from_utf8_lossy(&output.stdout)
        .trim()
        .parse()
        .map_err(|_| failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_closed_directory_above_the_data_is_named() {
        let root = tempfile::tempdir().unwrap();
        std::fs::set_permissions(root.path(), std::fs::Permissions::from_mode(0o711)).unwrap();
        let closed = root.path().join("closed");
        std::fs::create_dir(&closed).unwrap();
        std::fs::set_permissions(&closed, std::fs::Permissions::from_mode(0o700)).unwrap();

        let other = ServerUser {
            drop_to: Some((54_321, 54_321)),
            uid: 54_321,
        };
        assert_eq!(
            other.barrier(&closed.join("data/deeper")),
            Some(closed.clone())
        );
        assert_eq!(other.barrier(&root.path().join("open/data")), None);

        let ourselves = ServerUser {
            drop_to: None,
            uid: 54_321,
        };
        assert_eq!(ourselves.barrier(&closed.join("data")), None);
    }
}
