use super::*;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Stdio};

/// A home of its own, which the server's account can reach when we are root.
/// Dropped after its users, it stops the server before the files go.
struct TempHome(tempfile::TempDir, Options);

impl Drop for TempHome {
    fn drop(&mut self) {
        let _ = Local::stop(&self.1, true);
    }
}

fn home() -> (TempHome, Options) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).expect("chmod");
    let options = Options { linger: Duration::from_millis(100), ..Options::at(dir.path().join("home")) };
    (TempHome(dir, options.clone()), options)
}

fn sql(url: &str, statement: &str) -> Result<String, String> {
    let out = Command::new("psql").args([url, "-XAtqc", statement]).output().expect("psql");
    if out.status.success() {
        Ok(String::from_utf8(out.stdout).expect("text").trim().to_owned())
    } else {
        Err(String::from_utf8_lossy(&out.stderr).into_owned())
    }
}

fn pid(options: &Options) -> Option<u32> {
    Local::status(options).expect("status").pid
}

/// Returns when the watcher has ended: it gives its lock back then.
fn wait_for_watcher(options: &Options) {
    let watch = Home::open(options).expect("home").lock_file("watch.lock").expect("lock file");
    flock(&watch, FlockOperation::LockExclusive).expect("lock");
}

fn signal(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(pid.cast_signed()).expect("a pid"), signal).expect("kill");
}

/// Another process that holds the server, and its URL.
fn holder(options: &Options) -> (Child, String) {
    let mut child = Command::new(std::env::current_exe().expect("this test"))
        .args(["--exact", "postgres::local::tests::hold_until_stdin_closes"])
        .args(["--ignored", "--nocapture"])
        .env("TASKER_TEST_HOLD", &options.home)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("spawn");
    let out = BufReader::new(child.stdout.take().expect("piped"));
    let url = out
        .lines()
        .map_while(Result::ok)
        .find_map(|line| Some(line.split_once("held ")?.1.to_owned()))
        .expect("the other process holds the server");
    (child, url)
}

#[test]
#[ignore = "run by other tests as a second process"]
fn hold_until_stdin_closes() {
    let Some(home) = std::env::var_os("TASKER_TEST_HOLD") else {
        return;
    };
    let options = Options { linger: Duration::from_millis(100), ..Options::at(home) };
    let local = Local::start(&options).expect("start");
    println!("held {}", local.url());
    let _ = std::io::stdin().read(&mut [0]);
}

#[test]
fn server_is_shared_and_stops_after_the_last_user_which_was_killed() {
    let (_dir, options) = home();
    let (mut other, url) = holder(&options);
    let first = pid(&options).expect("runs");
    let ours = Local::start(&options).expect("join");
    assert_eq!(ours.url(), url);
    assert_eq!(pid(&options), Some(first), "one server for both");
    sql(&url, "create table kept as select 1 as n").expect("works");

    drop(ours);
    assert!(!Local::status(&options).expect("status").kept);
    assert!(Local::status(&options).expect("status").in_use);
    assert_eq!(sql(&url, "select n from kept").as_deref(), Ok("1"), "the other one still has it");

    other.kill().expect("SIGKILL");
    other.wait().expect("reaped");
    wait_for_watcher(&options);
    assert_eq!(pid(&options), None);

    let again = Local::start(&options).expect("start");
    assert_eq!(sql(&again.url(), "select n from kept").as_deref(), Ok("1"), "data is kept");
}

#[test]
fn newcomer_during_the_linger_keeps_the_server() {
    let (_dir, mut options) = home();
    options.linger = Duration::from_secs(1);
    let first = Local::start(&options).expect("start");
    let server = pid(&options);
    drop(first);
    let second = Local::start(&options).expect("join");
    // The watcher wakes from its linger, finds us and goes on waiting: it has
    // not given its lock back while the server is the same and answers.
    assert_eq!(pid(&options), server);
    assert_eq!(sql(&second.url(), "select pg_sleep(1.5), 'up'").as_deref(), Ok("|up"));
    assert_eq!(pid(&options), server);
    drop(second);
    wait_for_watcher(&options);
    assert_eq!(pid(&options), None);
}

#[test]
fn killed_server_is_recovered_though_its_pid_was_reused() {
    let (_dir, options) = home();
    let first = Local::start(&options).expect("start");
    sql(&first.url(), "create table kept as select 1 as n").expect("works");
    let dead = pid(&options).expect("runs");
    signal(dead, Signal::KILL);
    // Another process of the same account now has the pid. (Were it root's,
    // PostgreSQL itself would know that it cannot be a server.)
    let home = Home::open(&options).expect("home");
    let mut reused = home.account.command("sleep").arg("600").spawn().expect("spawn");
    for file in [home.data.join("postmaster.pid"), home.socket_dir().join(".s.PGSQL.5432.lock")] {
        let text = fs::read_to_string(&file).expect("pid file");
        let text = text.replacen(&dead.to_string(), &reused.id().to_string(), 1);
        fs::write(&file, text).expect("pid file");
    }
    assert_eq!(pid(&options), None, "somebody else's process is not our server");

    let second = Local::start(&options).expect("start");
    assert_eq!(sql(&second.url(), "select n from kept").as_deref(), Ok("1"));
    reused.kill().expect("kill");
    reused.wait().expect("reaped");
}

#[test]
fn detached_server_outlives_its_users_until_stop() {
    let (_dir, options) = home();
    let url = Local::start_detached(&options).expect("start");
    let server = pid(&options).expect("runs");
    drop(Local::start(&options).expect("join"));
    wait_for_watcher(&options);
    assert_eq!(pid(&options), Some(server));
    assert!(Local::status(&options).expect("status").kept);

    let user = Local::start(&options).expect("join");
    assert!(matches!(Local::reset(&options), Err(Error::InUse)));
    assert_eq!(Local::stop(&options, false).expect("stop"), Stopped::AfterLastUser);
    assert_eq!(sql(&url, "select 1").as_deref(), Ok("1"));
    drop(user);
    wait_for_watcher(&options);
    assert_eq!(pid(&options), None);

    Local::start_detached(&options).expect("start");
    let _user = Local::start(&options).expect("join");
    assert_eq!(Local::stop(&options, true).expect("stop"), Stopped::Now);
    assert_eq!(Local::stop(&options, true).expect("stop"), Stopped::NotRunning);
}

#[test]
fn killed_initdb_and_reset_leave_a_fresh_start() {
    let (_dir, options) = home();
    let home = Home::open(&options).expect("home");
    let half = home.spare_name("new");
    home.account.own_directory(&half).expect("directory");
    fs::write(half.join("PG_VERSION"), "15").expect("half a data directory");

    let local = Local::start(&options).expect("start");
    assert!(!half.exists());
    sql(&local.url(), "create table kept()").expect("works");
    drop(local);
    Local::reset(&options).expect("reset");
    assert_eq!(Local::status(&options).expect("status").data, None);
    let local = Local::start(&options).expect("start");
    assert!(sql(&local.url(), "select from kept").is_err(), "the table is gone");
}

#[test]
fn long_and_odd_home_gets_a_short_private_socket() {
    let (mut dir, _) = home();
    dir.1.home = dir.0.path().join("it's a home, ".to_owned() + &"x".repeat(90));
    let options = dir.1.clone();
    let local = Local::start(&options).expect("start");
    let home = Home::open(&options).expect("home");
    assert!(home.socket_dir().starts_with("/tmp"), "{}", home.socket_dir().display());
    assert_eq!(sql(&local.url(), "show listen_addresses").as_deref(), Ok(""));
    assert_eq!(sql(&local.url(), "show fsync").as_deref(), Ok("on"));
    drop(local);
    wait_for_watcher(&options);
    fs::remove_dir_all(home.socket_dir()).expect("cleaned");
}

#[test]
fn somebody_elses_socket_directory_is_refused() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let account = Account::for_data(&dir.path().join("data")).expect("account");
    let open = dir.path().join("open");
    account.own_directory(&open).expect("new");
    fs::set_permissions(&open, Permissions::from_mode(0o755)).expect("chmod");
    assert!(matches!(account.own_directory(&open), Err(Error::NotPrivate { mode: 0o755, .. })));
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&open, &link).expect("symlink");
    assert!(matches!(account.own_directory(&link), Err(Error::NotPrivate { .. })));
}

#[test]
fn programs_that_are_missing_or_too_old_for_the_data_are_named() {
    let (dir, mut options) = home();
    options.bin = Some(dir.0.path().to_owned());
    let error = Local::start(&options).expect_err("no programs there").to_string();
    assert!(error.contains("TASKER_PG_BIN") && error.contains(&dir.0.path().display().to_string()));

    let (_dir, options) = home();
    fs::create_dir_all(options.home.join("pg/data")).expect("directory");
    fs::write(options.home.join("pg/data/PG_VERSION"), "9\n").expect("version");
    let error = Local::start(&options).expect_err("other version").to_string();
    assert!(error.contains("made by PostgreSQL 9") && error.contains("tasker db reset"), "{error}");
}
