//! The managed server: started by its first user, shared by all, stopped a few
//! seconds after the last one ended or died.
//!
//! Everything lives in one directory, `pg`:
//!
//! - `users.lock`: every user holds a shared flock on it. The kernel releases
//!   it however the user ends, so it is always true.
//! - `control.lock`: held exclusively by whoever starts or stops the server,
//!   and inherited by the programs that do it, so that it is held until they
//!   end even if the one who ran them is killed.
//! - `watch.lock`: held by the script that stops the server (`watch.sh`), so
//!   that there is exactly one.
//! - `keep`: exists from `tasker db start` until `tasker db stop`.
//! - `postgresql.conf`: our settings, written anew at each start.
//! - `data/`, `run/`: the data and the socket, owned by the server's account.
//!
//! Lock order: control, then users. A lock is never waited for in the other
//! order, and nothing starts or stops the server without `control`.

use super::account::Account;
use super::binaries::Binaries;
use super::{Error, Options, io};
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process};
use sha2::{Digest, Sha256};
use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions, Permissions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// Recovery after a crash replays at most `max_wal_size`; this is ample.
const PATIENCE: Duration = Duration::from_mins(5);
/// The address of a unix socket holds 104 bytes on macOS (108 on Linux) with
/// its final NUL.
const LONGEST_SOCKET: usize = 103;

/// A user of the managed server. The server runs while this lives, and stops a
/// few seconds after the last one was dropped or its process died.
#[derive(Debug)]
pub struct Local {
    url: String,
    /// The shared lock that says so.
    _users: File,
}

/// The answer of `tasker db status`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// The server's process, if it runs.
    pub pid: Option<u32>,
    /// Whether it stays until `tasker db stop`.
    pub kept: bool,
    /// Whether a process uses it now.
    pub in_use: bool,
    /// The data directory, if there is one yet.
    pub data: Option<PathBuf>,
    /// The server's log file.
    pub log: PathBuf,
    /// How to connect when it runs.
    pub url: String,
}

/// What [`Local::stop`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stopped {
    /// It did not run.
    NotRunning,
    /// It ran and has stopped.
    Now,
    /// Other processes use it; it stops after the last of them.
    AfterLastUser,
}

impl Local {
    /// Starts the server, or joins it if it runs. Blocks until it accepts
    /// connections: a few milliseconds if it runs, about a second if not, some
    /// more the first time.
    pub fn start(options: &Options) -> Result<Self, Error> {
        let home = Home::open(options)?;
        let control = home.take_control()?;
        let users = home.lock_file("users.lock")?;
        lock(&users, FlockOperation::LockShared, &home.dir)?;
        let mut binaries = None;
        if !home.kept() {
            // Before the server, so that one is never left without the other.
            home.watch(options, &mut binaries)?;
        }
        home.run(options, &mut binaries, &control)?;
        Ok(Self { url: home.url(), _users: users })
    }

    /// A URL that psql and sqlx understand alike.
    pub fn url(&self) -> String {
        self.url.clone()
    }

    /// Starts the server if need be and leaves it running until
    /// [`stop`](Self::stop). Returns its URL.
    pub fn start_detached(options: &Options) -> Result<String, Error> {
        let home = Home::open(options)?;
        let control = home.take_control()?;
        let kept = home.kept();
        let mark = home.dir.join("keep");
        File::create(&mark).map_err(io("create", &mark))?;
        let started = home.run(options, &mut None, &control);
        if started.is_err() && !kept {
            let _ = fs::remove_file(&mark);
        }
        started.map(|()| home.url())
    }

    /// Ends what [`start_detached`](Self::start_detached) began. A server that
    /// others use is stopped after the last of them, or at once with `force`
    /// (their statements fail; what was committed is kept).
    pub fn stop(options: &Options, force: bool) -> Result<Stopped, Error> {
        let home = Home::open(options)?;
        let _control = home.take_control()?;
        home.unkeep()?;
        if home.server() == Server::Down {
            return Ok(Stopped::NotRunning);
        }
        if !force && home.in_use()? {
            home.watch(options, &mut None)?;
            return Ok(Stopped::AfterLastUser);
        }
        home.halt()?;
        Ok(Stopped::Now)
    }

    /// Looks, without starting anything.
    pub fn status(options: &Options) -> Result<Status, Error> {
        let home = Home::open(options)?;
        Ok(Status {
            pid: match home.server() {
                Server::Down => None,
                Server::Up { pid, .. } => Some(pid),
            },
            kept: home.kept(),
            in_use: home.in_use()?,
            data: home.data.exists().then(|| home.data.clone()),
            log: home.log(),
            url: home.url(),
        })
    }

    /// Stops the server and removes its data. Refused while others use it.
    pub fn reset(options: &Options) -> Result<(), Error> {
        let home = Home::open(options)?;
        let _control = home.take_control()?;
        if home.in_use()? {
            return Err(Error::InUse);
        }
        home.unkeep()?;
        home.halt()?;
        if home.data.exists() {
            // First out of the way: half a data directory must never be taken
            // for a whole one.
            let gone = home.spare_name("gone");
            fs::rename(&home.data, &gone).map_err(io("rename", &home.data))?;
        }
        home.remove_spares();
        Ok(())
    }
}

/// What the files say about the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Server {
    Down,
    Up { pid: u32, ready: bool },
}

/// The directory of the server.
struct Home {
    dir: PathBuf,
    data: PathBuf,
    account: Account,
}

impl Home {
    fn open(options: &Options) -> Result<Self, Error> {
        let root = rustix::process::geteuid().is_root();
        // The server's account must be able to pass through root's
        // directories; an ordinary user's need nobody.
        for (path, mode) in [
            (options.home.clone(), if root { 0o755 } else { 0o700 }),
            (options.home.join("pg"), if root { 0o711 } else { 0o700 }),
        ] {
            if !path.exists() {
                fs::create_dir_all(&path).map_err(io("create directory", &path))?;
                fs::set_permissions(&path, Permissions::from_mode(mode)).map_err(io("set the mode of", &path))?;
            }
        }
        // One name for one directory: the socket's place depends on it, and
        // the server is recognised by it.
        let dir = options.home.join("pg");
        let dir = dir.canonicalize().map_err(io("resolve", &dir))?;
        let owner = fs::metadata(&dir).map_err(io("look at", &dir))?.uid();
        let uid = rustix::process::geteuid().as_raw();
        if owner != uid {
            return Err(Error::OtherOwner { path: dir, owner, uid });
        }
        let data = dir.join("data");
        let account = Account::for_data(&data)?;
        Ok(Self { dir, data, account })
    }

    fn lock_file(&self, name: &str) -> Result<File, Error> {
        let path = self.dir.join(name);
        OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(io("open", &path))
    }

    fn take_control(&self) -> Result<File, Error> {
        let control = self.lock_file("control.lock")?;
        lock(&control, FlockOperation::LockExclusive, &self.dir)?;
        Ok(control)
    }

    fn kept(&self) -> bool {
        self.dir.join("keep").exists()
    }

    fn unkeep(&self) -> Result<(), Error> {
        let mark = self.dir.join("keep");
        match fs::remove_file(&mark) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(io("remove", &mark)(error)),
            _ => Ok(()),
        }
    }

    /// Whether anyone, ourselves included, holds the server.
    ///
    /// The watcher takes the lock exclusively for a moment, and a process that
    /// is just being forked has it until it execs; hence the second look. Who
    /// cannot even share the lock has met the watcher, which is no user.
    fn in_use(&self) -> Result<bool, Error> {
        let users = self.lock_file("users.lock")?;
        for _ in 0..3 {
            if !try_lock(&users, FlockOperation::NonBlockingLockShared, &self.dir)?
                || try_lock(&users, FlockOperation::NonBlockingLockExclusive, &self.dir)?
            {
                return Ok(false);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(true)
    }

    fn log(&self) -> PathBuf {
        self.data.join("server.log")
    }

    /// Beside the data, which nobody else can enter. Only where that is too
    /// long for the address of a socket, or would need quoting in the settings
    /// or the URL, a directory in /tmp, whose owner and mode are checked.
    fn socket_dir(&self) -> PathBuf {
        let near = self.dir.join("run");
        let plain = |b: &u8| b.is_ascii_alphanumeric() || b"/._-".contains(b);
        let bytes = near.as_os_str().as_bytes();
        if bytes.len() + "/.s.PGSQL.5432".len() <= LONGEST_SOCKET && bytes.iter().all(plain) {
            return near;
        }
        let mut name = format!("/tmp/tasker-{}-", self.account.uid);
        for byte in &Sha256::digest(self.dir.as_os_str().as_bytes())[..8] {
            let _ = write!(name, "{byte:02x}");
        }
        name.into()
    }

    /// Port and sslmode are named because `PGPORT` and `PGSSLMODE` of the
    /// environment would change them otherwise.
    fn url(&self) -> String {
        let socket = self.socket_dir();
        format!("postgresql:///tasker?host={}&port=5432&user=tasker&sslmode=disable", socket.display())
    }

    /// Reads the server's own pid file. A pid may have been given to another
    /// process since (or be a zombie that nobody reaps), so it counts only if
    /// that process is a server of this very directory.
    fn server(&self) -> Server {
        let Ok(text) = fs::read_to_string(self.data.join("postmaster.pid")) else {
            return Server::Down;
        };
        let mut lines = text.lines();
        let Some(pid) = lines.next().and_then(|l| l.trim().parse().ok()) else {
            return Server::Down;
        };
        if !self.is_server(pid) {
            return Server::Down;
        }
        // The eighth line is its state: starting, ready, stopping. One that was
        // killed this very moment is still there and says "ready", but accepts
        // nobody.
        let socket = self.socket_dir().join(".s.PGSQL.5432");
        let ready = lines.nth(6).is_some_and(|l| l.trim() == "ready") && UnixStream::connect(socket).is_ok();
        Server::Up { pid, ready }
    }

    fn is_server(&self, pid: u32) -> bool {
        let data = self.data.as_os_str().as_bytes();
        if Path::new("/proc/self/cmdline").exists() {
            let process = PathBuf::from(format!("/proc/{pid}"));
            // A server works in its data directory, and pg_ctl names it.
            fs::read_link(process.join("cwd")).is_ok_and(|cwd| cwd == self.data)
                || fs::read(process.join("cmdline")).is_ok_and(|line| line.split(|b| *b == 0).any(|arg| arg == data))
        } else {
            Command::new("ps")
                .args(["-ww", "-o", "command=", "-p", &pid.to_string()])
                .output()
                .is_ok_and(|out| out.stdout.windows(data.len()).any(|part| part == data))
        }
    }

    /// Sees to it that a watcher runs. `control` must be held.
    fn watch(&self, options: &Options, binaries: &mut Option<Binaries>) -> Result<(), Error> {
        let watch = self.lock_file("watch.lock")?;
        if !try_lock(&watch, FlockOperation::NonBlockingLockExclusive, &self.dir)? {
            return Ok(());
        }
        let pg_ctl = self.binaries(options, binaries)?.program("pg_ctl");
        self.account.check_reaches(&self.dir)?;
        // Without its comments, for whoever reads the list of processes.
        let script: String = include_str!("watch.sh")
            .lines()
            .filter(|line| !line.starts_with('#'))
            .flat_map(|line| [line, "\n"])
            .collect();
        let status = self
            .account
            .command("sh")
            .args(["-c", &script, "tasker-pg-watch"])
            .arg(pg_ctl)
            .arg(&self.data)
            .arg(self.dir.join("keep"))
            .arg(options.linger.as_secs_f32().to_string())
            // The lock goes to the script. The other two are opened anew: a
            // copy of ours would share our lock instead of waiting for it.
            .stdin(watch)
            .stdout(self.lock_file("users.lock")?)
            .stderr(self.lock_file("control.lock")?)
            // Ctrl-C in our terminal is not for it.
            .process_group(0)
            .status()
            .map_err(|source| Error::Run { program: "sh".to_owned(), source })?;
        if !status.success() {
            tracing::warn!(
                "neither `flock` nor `perl` is installed, so nothing stops the local PostgreSQL \
                 after its last user: use `tasker db stop`"
            );
        }
        Ok(())
    }

    fn binaries<'a>(&self, options: &Options, found: &'a mut Option<Binaries>) -> Result<&'a Binaries, Error> {
        if found.is_none() {
            let made_by =
                fs::read_to_string(self.data.join("PG_VERSION")).ok().and_then(|text| text.trim().parse().ok());
            *found = Some(Binaries::find(options, made_by)?);
        }
        Ok(found.as_ref().expect("just found"))
    }

    /// Returns when the server accepts connections. `control` must be held.
    fn run(&self, options: &Options, binaries: &mut Option<Binaries>, control: &File) -> Result<(), Error> {
        let begun = Instant::now();
        loop {
            match self.server() {
                Server::Up { ready: true, .. } => return Ok(()),
                // Somebody started or stopped it by hand, or pg_ctl gave up
                // waiting for a long recovery.
                Server::Up { pid, ready: false } => self.pause(begun, pid)?,
                Server::Down => {
                    let binaries = self.binaries(options, binaries)?;
                    self.account.check_reaches(&self.dir)?;
                    if !self.data.exists() {
                        self.init(binaries, control)?;
                    }
                    self.launch(binaries, control)?;
                }
            }
        }
    }

    fn pause(&self, begun: Instant, pid: u32) -> Result<(), Error> {
        if begun.elapsed() > PATIENCE {
            return Err(Error::NotReady { pid, waited: PATIENCE, log: self.log() });
        }
        std::thread::sleep(Duration::from_millis(20));
        Ok(())
    }

    /// Makes the data directory elsewhere and moves it into place when it is
    /// whole, database and all, so that a SIGKILL in between leaves none.
    ///
    /// Authentication is `trust`: only root and the server's account can reach
    /// the socket (its directory is theirs alone), and both could become any
    /// role anyway. `peer` would tell nobody apart and would bind the role's
    /// name to the account's. There is no other way in: no TCP, no replication.
    fn init(&self, binaries: &Binaries, control: &File) -> Result<(), Error> {
        self.remove_spares();
        let spare = self.spare_name("new");
        self.account.own_directory(&spare)?;
        let script = r#"
            "$1/initdb" -D "$2" -U tasker --auth-local=trust --auth-host=reject \
                --encoding=UTF8 --locale=C >/dev/null &&
            echo 'create database tasker' |
                "$1/postgres" --single -j -D "$2" -c exit_on_error=on postgres >/dev/null
        "#;
        let mut command = self.account.command("sh");
        command.args(["-c", script, "initdb"]).arg(&binaries.dir).arg(&spare);
        self.check(command, "initdb", control)?;
        fs::rename(&spare, &self.data).map_err(io("rename", &spare))
    }

    /// Starts the server over what the last one may have left behind.
    fn launch(&self, binaries: &Binaries, control: &File) -> Result<(), Error> {
        let socket = self.socket_dir();
        self.account.own_directory(&socket)?;
        let conf = self.dir.join("postgresql.conf");
        fs::write(&conf, self.settings(binaries)).map_err(io("write", &conf))?;
        fs::set_permissions(&conf, Permissions::from_mode(0o644)).map_err(io("set the mode of", &conf))?;
        // No server runs here, we hold `control`, and yet PostgreSQL refuses
        // to start if the pid of the dead one now belongs to another process
        // of the account (after a reboot, say, or while it is a zombie). So a
        // pid that cannot exist takes its place. The file itself must stay:
        // its last line lets the new server see whether a backend of the dead
        // one is still attached to the data.
        let script = r#"
            cd "$1" || exit
            if [ -e postmaster.pid ]; then
                { echo 2147483646; tail -n +2 postmaster.pid; } >postmaster.pid.new &&
                    mv postmaster.pid.new postmaster.pid || exit
            fi
            rm -f "$2"/.s.PGSQL.5432 "$2"/.s.PGSQL.5432.lock
            if [ -n "$(find server.log -size +32768 2>/dev/null)" ]; then
                mv server.log server.log.old
            fi
            options=$4
            if "$3/postgres" -D "$1" -c wal_compression=lz4 -C wal_compression >/dev/null 2>&1; then
                options="$options -c wal_compression=lz4"
            fi
            exec "$3/pg_ctl" start -D "$1" -l server.log -o "$options" -s -w -t 300
        "#;
        let option = format!("-c config_file='{}'", conf.display().to_string().replace('\'', r"'\''"));
        let begun = Instant::now();
        loop {
            let mut command = self.account.command("sh");
            command.args(["-c", script, "pg_ctl"]).args([&self.data, &socket, &binaries.dir]).arg(&option);
            match self.check(command, "pg_ctl start", control) {
                // Backends of a killed server notice within moments.
                Err(Error::Failed { output, .. })
                    if output.contains("is still in use") && begun.elapsed() < Duration::from_secs(30) =>
                {
                    std::thread::sleep(Duration::from_millis(100));
                }
                result => return result,
            }
        }
    }

    /// Stops the server, if it runs, and waits for its end. `control` must be
    /// held.
    fn halt(&self) -> Result<(), Error> {
        let begun = Instant::now();
        let mut asked = None;
        while let Server::Up { pid, .. } = self.server() {
            if asked != Some(pid) {
                asked = Some(pid);
                // A "fast" shutdown: sessions are ended, nothing is lost.
                if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
                    let _ = kill_process(pid, Signal::INT);
                }
            }
            self.pause(begun, pid)?;
        }
        Ok(())
    }

    /// Runs one of PostgreSQL's programs, which holds `control` too.
    fn check(&self, mut command: Command, program: &str, control: &File) -> Result<(), Error> {
        let control = control.try_clone().map_err(io("share the lock in", &self.dir))?;
        let before = fs::metadata(self.log()).map_or(0, |log| log.len());
        let out =
            command.stdin(control).output().map_err(|source| Error::Run { program: program.to_owned(), source })?;
        if out.status.success() {
            return Ok(());
        }
        let mut output = String::from_utf8_lossy(&out.stderr).trim().to_owned();
        if let Ok(log) = fs::read(self.log()) {
            let start = usize::try_from(before).unwrap_or(0);
            let news = log.get(start..).unwrap_or(&log);
            let _ = write!(output, "\n{}", String::from_utf8_lossy(news).trim());
        }
        Err(Error::Failed { program: program.to_owned(), output })
    }

    /// A name beside `data` that no other process uses.
    fn spare_name(&self, what: &str) -> PathBuf {
        self.dir.join(format!("data.{what}-{}", uuid::Uuid::new_v4().simple()))
    }

    /// Removes what a killed `init` or `reset` left, as far as it goes.
    fn remove_spares(&self) {
        for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            if entry.file_name().as_bytes().starts_with(b"data.") {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }

    fn settings(&self, binaries: &Binaries) -> String {
        let mut text = format!("{SETTINGS}unix_socket_directories = '{}'\n", self.socket_dir().display());
        if binaries.has_library("pg_stat_statements") {
            text.push_str("shared_preload_libraries = 'pg_stat_statements'\n");
        }
        text
    }
}

/// For the many small transactions of a queue on a laptop. Durability is never
/// traded: fsync and `synchronous_commit` stay on.
const SETTINGS: &str = "\
# Written by Tasker at each start of its local server; ALTER SYSTEM overrides it.
cluster_name = 'tasker'
listen_addresses = ''
port = 5432
unix_socket_permissions = 0700
max_connections = 200
timezone = 'UTC'
log_timezone = 'UTC'
shared_buffers = 256MB
# Fewer checkpoints write fewer full pages; the price is a longer recovery.
max_wal_size = 4GB
checkpoint_timeout = 15min
checkpoint_completion_target = 0.9
# lz4 where it is compiled in (see the command line); this one costs more.
wal_compression = on
# One server, no standby.
wal_level = minimal
max_wal_senders = 0
# Queue tables turn over completely within seconds.
autovacuum_naptime = 5s
autovacuum_vacuum_cost_limit = 10000
jit = off
";

fn lock(file: &File, how: FlockOperation, dir: &Path) -> Result<(), Error> {
    loop {
        match flock(file, how) {
            Err(rustix::io::Errno::INTR) => {}
            result => return result.map_err(|e| io("lock a file in", dir)(e.into())),
        }
    }
}

/// Whether the lock could be taken at once.
fn try_lock(file: &File, how: FlockOperation, dir: &Path) -> Result<bool, Error> {
    match flock(file, how) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
        Err(error) => Err(io("lock a file in", dir)(error.into())),
    }
}

#[cfg(test)]
mod tests;
