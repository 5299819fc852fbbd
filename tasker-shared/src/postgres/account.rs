//! Under which account the server runs, and directories that only it can enter.
//!
//! PostgreSQL refuses to run as root, so root's server runs as `postgres` or
//! `nobody`. Nothing here writes as root into a directory which that account
//! owns: whoever controls the account could have put a symbolic link there.

use super::{Error, io};
use std::fs;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

/// The account of the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Account {
    pub uid: u32,
    pub gid: u32,
    /// Set when we are root and have to change to it.
    pub name: Option<String>,
}

impl Account {
    /// The account for a server whose data is, or will be, at `data`.
    ///
    /// Data that exists stays with its owner, also when a better account has
    /// appeared since.
    pub fn for_data(data: &Path) -> Result<Self, Error> {
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        if uid != 0 {
            return Ok(Self { uid, gid, name: None });
        }
        if let Ok(owner) = fs::metadata(data) {
            return Ok(Self { uid: owner.uid(), gid: owner.gid(), name: Some(format!("uid {}", owner.uid())) });
        }
        ["postgres", "nobody"]
            .into_iter()
            .find_map(|name| Some(Self { uid: id("-u", name)?, gid: id("-g", name)?, name: Some(name.to_owned()) }))
            .ok_or(Error::NoAccount)
    }

    /// A command that runs under this account, in an environment of its own:
    /// a stray `PGDATA`, `PGOPTIONS` or locale of the caller changes nothing.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        let path = std::env::var("PATH").unwrap_or_default();
        command
            .env_clear()
            .env("PATH", format!("{path}:/usr/local/bin:/usr/bin:/bin"))
            .env("LC_ALL", "C")
            .env("TZ", "UTC")
            // The caller's directory may be closed to the account.
            .current_dir("/")
            .stdin(Stdio::null());
        if self.name.is_some() {
            // The standard library also drops root's supplementary groups.
            command.uid(self.uid).gid(self.gid);
        }
        command
    }

    /// Makes `path` a directory that this account owns and nobody else enters,
    /// or checks that it is one.
    pub fn own_directory(&self, path: &Path) -> Result<(), Error> {
        match fs::DirBuilder::new().mode(0o700).create(path) {
            Ok(()) => {
                if self.name.is_some() {
                    chown(path, Some(self.uid), Some(self.gid)).map_err(io("give away", path))?;
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(io("create directory", path)(error)),
        }
        // Not `metadata`: in /tmp somebody else's symbolic link may wait here.
        let found = fs::symlink_metadata(path).map_err(io("look at", path))?;
        if found.is_dir() && found.uid() == self.uid && found.mode() & 0o777 == 0o700 {
            Ok(())
        } else {
            Err(Error::NotPrivate {
                path: path.to_owned(),
                wanted: self.uid,
                uid: found.uid(),
                mode: found.mode() & 0o7777,
            })
        }
    }

    /// Errors with the way out if the account cannot enter `path`.
    pub fn check_reaches(&self, path: &Path) -> Result<(), Error> {
        let Some(name) = &self.name else {
            return Ok(());
        };
        let reached = self
            .command("sh")
            .args(["-c", "cd \"$1\"", "sh"])
            .arg(path)
            .stderr(Stdio::null())
            .status()
            .map_err(|source| Error::Run { program: format!("sh as {name}"), source })?;
        if reached.success() {
            Ok(())
        } else {
            Err(Error::Unreachable { path: path.to_owned(), account: name.clone() })
        }
    }
}

/// A number of a named account; asking `id` also finds accounts that are not
/// in /etc/passwd.
fn id(flag: &str, name: &str) -> Option<u32> {
    let out = Command::new("id").args([flag, name]).output().ok()?;
    String::from_utf8(out.stdout).ok()?.trim().parse().ok()
}
