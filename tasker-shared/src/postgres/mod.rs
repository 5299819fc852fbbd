//! Which database we talk to: the one that `DATABASE_URL` names, or a managed
//! local PostgreSQL that needs no setup.
//!
//! Everything here blocks (it starts processes and waits for file locks): call
//! it before the runtime's work begins, or through `spawn_blocking`.

mod account;
mod binaries;
mod local;

pub use local::{Local, Status, Stopped};

use std::path::{Path, PathBuf};
use std::time::Duration;

/// The database in use; keep it for as long as you use the database.
#[derive(Debug)]
pub enum Database {
    /// Somebody else's server, named by `DATABASE_URL`.
    External {
        /// The value of `DATABASE_URL`.
        url: String,
    },
    /// The managed local server.
    Local(Local),
}

impl Database {
    /// `DATABASE_URL` if it is set and not empty (it is not connected to),
    /// else the managed local server, started if need be.
    pub fn open() -> Result<Self, Error> {
        match std::env::var("DATABASE_URL") {
            Ok(url) if !url.is_empty() => Ok(Self::External { url }),
            _ => Ok(Self::Local(Local::start(&Options::from_env()?)?)),
        }
    }

    /// A URL that psql and sqlx understand alike.
    pub fn url(&self) -> String {
        match self {
            Self::External { url } => url.clone(),
            Self::Local(local) => local.url(),
        }
    }
}

/// Where the managed server lives and which programs it runs.
#[derive(Debug, Clone)]
pub struct Options {
    /// The server is kept in `pg` below this directory.
    pub home: PathBuf,
    /// The directory of `postgres`, `initdb` and `pg_ctl`; found if not given.
    pub bin: Option<PathBuf>,
    /// How long the server stays after its last user.
    pub linger: Duration,
}

impl Options {
    /// A server below `home`, with the defaults for the rest.
    pub fn at(home: impl Into<PathBuf>) -> Self {
        Self { home: home.into(), bin: None, linger: Duration::from_secs(3) }
    }

    /// Reads `TASKER_HOME` and `TASKER_PG_BIN`.
    ///
    /// Without `TASKER_HOME` the server is kept in `/var/lib/tasker` for root,
    /// where the unprivileged account it runs as can reach it, and in
    /// `$XDG_DATA_HOME/tasker` or `~/.local/share/tasker` for everybody else.
    pub fn from_env() -> Result<Self, Error> {
        let set = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let home = set("TASKER_HOME")
            .or_else(|| rustix::process::geteuid().is_root().then(|| PathBuf::from("/var/lib/tasker")))
            .or_else(|| Some(set("XDG_DATA_HOME")?.join("tasker")))
            .or_else(|| Some(set("HOME")?.join(".local/share/tasker")))
            .ok_or(Error::NoHome)?;
        Ok(Self { bin: set("TASKER_PG_BIN"), ..Self::at(home) })
    }
}

/// Why there is no local server, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing says where to keep the server.
    #[error("no directory for the local PostgreSQL: set TASKER_HOME (or HOME), or set DATABASE_URL")]
    NoHome,
    /// No programs were found and none could be fetched.
    #[error(
        "no PostgreSQL 14 to 18 found; {fetch}.\n\
         Install it (Debian, Ubuntu: `apt-get install postgresql`; Fedora: `dnf install \
         postgresql-server postgresql-contrib`; Arch: `pacman -S postgresql`; macOS: `brew install \
         postgresql@17`), or set TASKER_PG_BIN to the directory of its `postgres`, `initdb` and \
         `pg_ctl`, or set DATABASE_URL to use a server that runs already"
    )]
    NoBinaries {
        /// Why nothing was fetched.
        fetch: String,
    },
    /// The explicit setting does not lead to a server's programs.
    #[error(
        "TASKER_PG_BIN is {path}, which lacks `postgres`, `initdb` or `pg_ctl`, or they do not \
         run: name the `bin` directory of a PostgreSQL server"
    )]
    BadBin {
        /// The setting.
        path: PathBuf,
    },
    /// The data was made by a version that is not installed.
    #[error(
        "the local data was made by PostgreSQL {made_by}, but only {found:?} is installed: install \
         PostgreSQL {made_by}, or remove the data with `tasker db reset`"
    )]
    OtherVersion {
        /// The major version of the data.
        made_by: u32,
        /// The major versions that were found.
        found: Vec<u32>,
    },
    /// We are root, and there is no account to drop to.
    #[error(
        "PostgreSQL does not run as root, and neither the account `postgres` nor `nobody` exists: \
         create one, run as an ordinary user, or set DATABASE_URL"
    )]
    NoAccount,
    /// The account of the server cannot reach its directory.
    #[error(
        "{account}, under which the server runs because you are root, cannot enter {path}: allow it \
         (`chmod o+x` on the directory and those above it), or set TASKER_HOME to a directory that \
         everybody may enter"
    )]
    Unreachable {
        /// The directory.
        path: PathBuf,
        /// The account.
        account: String,
    },
    /// The directory belongs to another user.
    #[error(
        "{path} belongs to uid {owner}, you are uid {uid}: run as that user, or set TASKER_HOME to a \
         directory of your own"
    )]
    OtherOwner {
        /// The directory.
        path: PathBuf,
        /// Who owns it.
        owner: u32,
        /// Who we are.
        uid: u32,
    },
    /// A directory that must be private is not.
    #[error(
        "{path} must be a directory of uid {wanted} with mode 0700, but it is of uid {uid} with mode \
         {mode:04o}: remove it"
    )]
    NotPrivate {
        /// The directory.
        path: PathBuf,
        /// Who should own it.
        wanted: u32,
        /// Who owns it.
        uid: u32,
        /// Its mode.
        mode: u32,
    },
    /// Others use the server.
    #[error("the local PostgreSQL is in use by other processes: end them first")]
    InUse,
    /// A file operation failed.
    #[error("could not {doing} {path}: {source}")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A program could not be run at all.
    #[error("could not run {program}: {source}")]
    Run {
        /// The program.
        program: String,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A program of PostgreSQL failed.
    #[error("{program} failed: {output}")]
    Failed {
        /// The program.
        program: String,
        /// What it printed, and the end of the server's log.
        output: String,
    },
    /// The server neither became ready nor ended.
    #[error("the local PostgreSQL (pid {pid}) is not ready after {waited:?}; its log: {log}")]
    NotReady {
        /// The server's process.
        pid: u32,
        /// How long we waited.
        waited: Duration,
        /// Where to look.
        log: PathBuf,
    },
}

/// For `map_err`: what was tried on which path.
fn io(doing: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Error + use<> {
    let path = path.to_owned();
    move |source| Error::Io { doing, path, source }
}
