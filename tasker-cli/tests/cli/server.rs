//! What the command says of a server, a database or a pooler that cannot be used, and how it waits.

use std::io::{BufRead as _, BufReader};
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use tasker_orchestration::{Options, Orchestrator};
use tasker_testing::TestDatabase;
use tokio_util::sync::CancellationToken;

use crate::shop::{command, run};

/// The key of the lock of the migrations.
const LOCK: i64 = 0x0074_6173_6b65_7201;
/// Every command that goes on until it is told to stop.
const LONG: [&[&str]; 5] = [
    &["orchestrator", "run"],
    &["worker", "run"],
    &["worker", "example"],
    &["up", "--listen", "127.0.0.1:0"],
    &["api", "run", "--listen", "127.0.0.1:0"],
];

async fn connect(database: &TestDatabase) -> PgConnection {
    PgConnection::connect(&database.url()).await.expect("connected")
}

fn terminate(child: &Child) {
    let id = i32::try_from(child.id()).ok().filter(|id| *id > 1).and_then(rustix::process::Pid::from_raw);
    rustix::process::kill_process(id.expect("the id of a child"), rustix::process::Signal::TERM).expect("it runs");
}

#[tokio::test]
async fn waiting_for_the_migrations_lock_is_said_and_ends_with_sigterm() {
    let database = TestDatabase::empty().await;
    let mut held = connect(&database).await;
    let pid: i32 = sqlx::query_scalar("select pg_backend_pid() from pg_advisory_lock($1)")
        .bind(LOCK)
        .fetch_one(&mut held)
        .await
        .expect("the lock");
    let commands = LONG.into_iter().chain([["migrate"].as_slice(), &["task", "list"]]);
    let waiting: Vec<_> = commands
        .map(|arguments| {
            let mut child = command(&database.url(), arguments)
                .stderr(Stdio::piped())
                .stdout(Stdio::null())
                .spawn()
                .expect(arguments[0]);
            let lines = BufReader::new(child.stderr.take().expect("piped")).lines();
            (arguments, child, lines)
        })
        .collect();
    for (arguments, mut child, mut lines) in waiting {
        let said = lines.find_map(|line| line.ok().filter(|line| line.contains("waiting for the lock")));
        let said = said.unwrap_or_else(|| panic!("{arguments:?} says nothing"));
        assert!(said.contains(&format!("process {pid} of the server")) && said.contains(", since 2"), "{said}");
        let told = Instant::now();
        terminate(&child);
        let ended = child.wait().expect("it ends");
        assert!(told.elapsed() < Duration::from_secs(5), "{arguments:?} took {:?}", told.elapsed());
        // A command that has nothing to finish is ended by the signal itself.
        let expected = if LONG.contains(&arguments) { (Some(0), None) } else { (None, Some(15)) };
        assert_eq!((ended.code(), ended.signal()), expected, "{arguments:?}");
        let rest: Vec<String> = lines.map_while(Result::ok).collect();
        assert!(!rest.iter().any(|line| line.contains("error")), "{arguments:?}: {rest:?}");
    }
    let made: bool =
        sqlx::query_scalar("select to_regnamespace('tasker') is not null").fetch_one(&mut held).await.expect("asked");
    assert!(!made, "nothing was done without the lock");
}

#[tokio::test]
async fn unfit_databases_are_told_in_one_line() {
    let latin = TestDatabase::made_with("encoding 'LATIN1' lc_collate 'C' lc_ctype 'C'").await;
    for arguments in LONG.into_iter().chain([["migrate"].as_slice()]) {
        let answer = run(&mut command(&latin.url(), arguments)).exits_with(1);
        assert!(answer.stderr.starts_with("error: the database tasker_test_"), "{arguments:?}: {}", answer.stderr);
        assert!(answer.stderr.contains("has the encoding LATIN1, but Tasker needs UTF8: "), "{}", answer.stderr);
        assert_eq!(answer.stderr.lines().count(), 1, "{}", answer.stderr);
    }

    let frozen = TestDatabase::fresh().await;
    let mut conn = connect(&frozen).await;
    let name: String = sqlx::query_scalar("select current_database()").fetch_one(&mut conn).await.expect("its name");
    let set = format!("alter database {name} set default_transaction_read_only = on");
    sqlx::query(AssertSqlSafe(set)).execute(&mut conn).await.expect("set");
    for arguments in LONG {
        let answer = run(&mut command(&frozen.url(), arguments)).exits_with(1);
        let last = answer.stderr.lines().last().unwrap_or_default();
        assert!(
            last.starts_with("error: ") && last.contains("are read only, by default_transaction_read_only"),
            "{last}"
        );
    }
    // What only reads goes on.
    run(&mut command(&frozen.url(), &["task", "list"])).exits_with(0);
}

/// A pooler in front of the server of a database, sharing sessions between transactions.
struct Pooler {
    child: Child,
    folder: tempfile::TempDir,
}

impl Pooler {
    const PORT: u16 = 6432;

    /// `ignored` are the parameters at the start of a session that it drops instead of refusing them.
    fn start(database: &TestDatabase, ignored: &str) -> Self {
        use std::fs::{Permissions, create_dir, set_permissions, write};
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::Builder::new().prefix("tasker-pooler-").tempdir_in("/tmp").expect("a folder");
        // As root it runs under another account, which has to make its socket there.
        set_permissions(folder.path(), Permissions::from_mode(0o755)).expect("set");
        let sockets = folder.path().join("run");
        create_dir(&sockets).expect("a folder");
        set_permissions(&sockets, Permissions::from_mode(0o777)).expect("set");
        let url = database.url();
        let parameter = |name: &str| {
            let (_, parameters) = url.split_once('?').expect("the local server is reached through a socket");
            let value = parameters.split('&').find_map(|parameter| parameter.strip_prefix(name)?.strip_prefix('='));
            value.expect("a parameter").to_owned()
        };
        let file = folder.path().join("pgbouncer.ini");
        write(
            &file,
            format!(
                "[databases]\n* = host={} port={} user={user}\n[pgbouncer]\nlisten_addr =\nlisten_port = {}\n\
                 unix_socket_dir = {run}\nauth_type = any\npool_mode = transaction\ndefault_pool_size = 5\n{ignored}\n",
                parameter("host"),
                parameter("port"),
                Self::PORT,
                user = parameter("user"),
                run = sockets.display(),
            ),
        )
        .expect("written");
        let mut pgbouncer = Command::new("pgbouncer");
        if rustix::process::geteuid().is_root() {
            pgbouncer.args(["-u", "postgres"]);
        }
        // Debian keeps it where an ordinary user's PATH does not lead.
        let path = format!("{}:/usr/sbin", std::env::var("PATH").unwrap_or_default());
        let child = pgbouncer
            .env("PATH", path)
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("PgBouncer is installed");
        let pooler = Self { child, folder };
        let socket = sockets.join(format!(".s.PGSQL.{}", Self::PORT));
        let began = Instant::now();
        while std::os::unix::net::UnixStream::connect(&socket).is_err() {
            assert!(began.elapsed() < Duration::from_secs(20), "PgBouncer does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        pooler
    }

    /// The same database, through it.
    fn url(&self, database: &TestDatabase) -> String {
        let url = database.url();
        let (place, _) = url.split_once('?').expect("parameters");
        format!(
            "{place}?host={}&port={}&user=tasker&sslmode=disable",
            self.folder.path().join("run").display(),
            Self::PORT
        )
    }
}

impl Drop for Pooler {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// How many advisory locks are held in a database.
async fn locks(conn: &mut PgConnection) -> i64 {
    sqlx::query_scalar(
        "select count(*) from pg_locks where locktype = 'advisory' \
         and database = (select oid from pg_database where datname = current_database())",
    )
    .fetch_one(conn)
    .await
    .expect("locks")
}

fn refused(url: &str, arguments: &[&str], why: &str) {
    let answer = run(&mut command(url, arguments)).exits_with(1);
    let last = answer.stderr.lines().last().unwrap_or_default();
    assert!(
        last.starts_with("error: ")
            && last.contains(&format!(
                "the database's URL leads to a pooler ({why}), but Tasker needs a direct connection"
            ))
            && last.ends_with("(its port is 5432 unless it was changed; 6432 is PgBouncer's)"),
        "{arguments:?}: {}",
        answer.stderr
    );
    assert_eq!(last.matches("pooler").count(), 1, "said once: {last}");
    assert_eq!(answer.stderr.lines().count(), 1, "{}", answer.stderr);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PgBouncer; .ci/run runs it"]
async fn pooler_of_transactions_is_told_at_the_start_and_keeps_no_lock() {
    const DROPS: &str = "ignore_startup_parameters = extra_float_digits,options";
    for (which, fresh) in [TestDatabase::empty().await, TestDatabase::fresh().await].into_iter().enumerate() {
        let pooler = Pooler::start(&fresh, DROPS);
        let url = pooler.url(&fresh);
        let mut direct = connect(&fresh).await;
        for _ in 0..10 {
            refused(&url, &["migrate"], "it shares the server's sessions among connections");
            assert_eq!(locks(&mut direct).await, 0);
        }
        for arguments in LONG {
            refused(&url, arguments, "it shares the server's sessions among connections");
            assert_eq!(locks(&mut direct).await, 0);
        }
        let made: bool = sqlx::query_scalar("select to_regnamespace('tasker') is not null")
            .fetch_one(&mut direct)
            .await
            .expect("asked");
        assert_eq!(made, which == 1, "nothing was changed");
        // As a library: without the command's own look at the start.
        let worker = tasker_worker::Worker::builder(&url).namespace("shop").builtins().build().expect("a worker");
        let error = worker.run(CancellationToken::new()).await.expect_err("refused").to_string();
        assert!(error.starts_with("the database's URL leads to a pooler (it shares"), "{error}");
        let error = Orchestrator::start(&url, &Options::default()).await.expect_err("refused").to_string();
        assert!(error.starts_with("the database's URL leads to a pooler (it shares"), "{error}");
        drop(pooler);

        // Several clients at once, each with its own luck.
        let pooler = Pooler::start(&fresh, DROPS);
        let url = pooler.url(&fresh);
        let mut running: Vec<Child> = (0..8)
            .map(|_| command(&url, &["migrate"]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("tasker"))
            .collect();
        for child in running.drain(..) {
            let output = child.wait_with_output().expect("it ends");
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(output.status.code() == Some(1) && said.contains("leads to a pooler"), "{said}");
        }
        assert_eq!(locks(&mut direct).await, 0);
        drop(pooler);

        let strict = Pooler::start(&fresh, "");
        refused(&strict.url(&fresh), &["migrate"], "unsupported startup parameter: extra_float_digits");
        let stricter = Pooler::start(&fresh, "ignore_startup_parameters = extra_float_digits");
        refused(&stricter.url(&fresh), &["orchestrator", "run"], "unsupported startup parameter: options");
        drop((strict, stricter));

        // And the direct way is free.
        run(&mut command(&fresh.url(), &["migrate"])).exits_with(0);
    }
}
