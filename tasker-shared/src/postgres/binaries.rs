//! Finding the programs of an installed PostgreSQL, or fetching them.

use super::{Error, Options};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What a server cannot be started without.
const PROGRAMS: [&str; 3] = ["postgres", "initdb", "pg_ctl"];
/// The versions we support, newest first.
const VERSIONS: [u32; 5] = [18, 17, 16, 15, 14];

/// A directory with the server's programs, and their major version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Binaries {
    pub dir: PathBuf,
    pub version: u32,
}

impl Binaries {
    /// Looks in the explicit setting, or else where `pg_config` says, in PATH
    /// and where distributions install; takes the first that is supported and,
    /// if data exists already, of the version that made it.
    pub fn find(options: &Options, made_by: Option<u32>) -> Result<Self, Error> {
        if let Some(dir) = &options.bin {
            let found = Self::at(dir).ok_or_else(|| Error::BadBin { path: dir.clone() })?;
            return match made_by {
                Some(made_by) if made_by != found.version => {
                    Err(Error::OtherVersion { made_by, found: vec![found.version] })
                }
                _ => Ok(found),
            };
        }
        let mut others = Vec::new();
        for dir in candidates() {
            let Some(found) = Self::at(&dir) else {
                continue;
            };
            if VERSIONS.contains(&found.version) && made_by.is_none_or(|v| v == found.version) {
                return Ok(found);
            }
            if !others.contains(&found.version) {
                others.push(found.version);
            }
        }
        match made_by {
            Some(made_by) if !others.is_empty() => Err(Error::OtherVersion { made_by, found: others }),
            _ => fetch(options),
        }
    }

    /// The programs in `dir`, if all are there and run.
    fn at(dir: &Path) -> Option<Self> {
        if !PROGRAMS.iter().all(|name| dir.join(name).is_file()) {
            return None;
        }
        let out = Command::new(dir.join("postgres")).arg("-V").output().ok()?;
        let text = String::from_utf8(out.stdout).ok()?;
        // "postgres (PostgreSQL) 15.14 (Debian 15.14-0+deb12u1)", "… 18beta1"
        let after = text.split_once("(PostgreSQL) ")?.1;
        let digits = after.find(|c: char| !c.is_ascii_digit()).unwrap_or(after.len());
        Some(Self { dir: dir.to_owned(), version: after[..digits].parse().ok()? })
    }

    pub fn program(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Whether the server could load `library`. Naming one that is missing in
    /// `shared_preload_libraries` keeps it from starting, so doubt means no.
    pub fn has_library(&self, library: &str) -> bool {
        let real = self.dir.canonicalize().unwrap_or_else(|_| self.dir.clone());
        let configured = ask(&self.program("pg_config"), "--pkglibdir");
        [
            configured,
            Some(real.join("../lib")),
            Some(real.join("../lib/postgresql")),
            Some(real.join("../lib64/pgsql")),
            Some(real.join("../lib/pgsql")),
        ]
        .into_iter()
        .flatten()
        .any(|dir| ["so", "dylib"].iter().any(|end| dir.join(library).with_extension(end).is_file()))
    }
}

/// The path that a program prints for one flag.
fn ask(program: &Path, flag: &str) -> Option<PathBuf> {
    let out = Command::new(program).arg(flag).stderr(Stdio::null()).output().ok()?;
    let text = String::from_utf8(out.stdout).ok()?;
    (!text.trim().is_empty()).then(|| PathBuf::from(text.trim()))
}

fn candidates() -> Vec<PathBuf> {
    let mut dirs: Vec<PathBuf> = ask(Path::new("pg_config"), "--bindir").into_iter().collect();
    if let Some(path) = std::env::var_os("PATH") {
        dirs.extend(std::env::split_paths(&path));
    }
    for v in VERSIONS {
        dirs.extend([
            format!("/usr/lib/postgresql/{v}/bin").into(), // Debian, Ubuntu
            format!("/usr/pgsql-{v}/bin").into(),          // the PostgreSQL project's RPMs
            format!("/usr/lib/postgresql{v}/bin").into(),  // SUSE
            format!("/usr/libexec/postgresql{v}").into(),  // Alpine
            format!("/opt/homebrew/opt/postgresql@{v}/bin").into(),
            format!("/usr/local/opt/postgresql@{v}/bin").into(),
            format!("/Applications/Postgres.app/Contents/Versions/{v}/bin").into(),
        ]);
    }
    dirs
}

#[cfg(not(feature = "fetch-postgres"))]
fn fetch(_: &Options) -> Result<Binaries, Error> {
    Err(Error::NoBinaries { fetch: "this program was built without the feature `fetch-postgres`".to_owned() })
}

/// Downloads PostgreSQL into the home directory, once.
#[cfg(feature = "fetch-postgres")]
fn fetch(options: &Options) -> Result<Binaries, Error> {
    use postgresql_embedded::{PostgreSQL, Settings, VersionReq};

    let failed =
        |error: &dyn std::fmt::Display| Error::NoBinaries { fetch: format!("downloading PostgreSQL failed: {error}") };
    let dir = options.home.join("postgresql");
    // `setup` would also run initdb, as whoever we are; it does not where it
    // sees this file.
    let scratch = tempfile::tempdir().map_err(|e| failed(&e))?;
    std::fs::write(scratch.path().join("postgresql.conf"), "").map_err(|e| failed(&e))?;
    let defaults = Settings::new();
    // It makes directories for what we do not use.
    for unused in [Some(defaults.data_dir.as_path()), defaults.password_file.parent()] {
        let _ = unused.map(std::fs::remove_dir);
    }
    let settings = Settings {
        version: VersionReq::parse("=17").map_err(|e| failed(&e))?,
        installation_dir: dir,
        data_dir: scratch.path().to_owned(),
        temporary: false,
        ..defaults
    };
    tracing::info!("no PostgreSQL is installed; downloading one");
    // On a thread of its own, since the caller may be inside a runtime.
    let installed = std::thread::scope(|scope| {
        scope
            .spawn(|| {
                tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|e| failed(&e))?.block_on(
                    async {
                        let mut server = PostgreSQL::new(settings);
                        tokio::time::timeout(std::time::Duration::from_mins(5), server.setup())
                            .await
                            .map_err(|_| failed(&"not finished after five minutes"))?
                            .map_err(|e| failed(&e))?;
                        Ok(server.settings().binary_dir())
                    },
                )
            })
            .join()
            .unwrap_or_else(|_| Err(failed(&"the download panicked")))
    })?;
    Binaries::at(&installed).ok_or_else(|| failed(&"the archive lacks the server's programs"))
}
