//! The command against a database of its own.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};

use serde_json::Value;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use tasker_shared::store::templates;
use tasker_shared::template;
use tasker_testing::TestDatabase;

/// One step for each built-in way to end.
pub const TEMPLATE: &str = r#"
namespace: shop
name: order
version: "1"
input_schema: {type: object, required: [order_id]}
steps:
  - {name: try, handler: fail, input: "${input}", retry: {initial_interval: 10ms}}
  - {name: done, handler: echo, depends_on: [try], input: {try: "${steps.try.output}"}}
"#;

pub struct Answer {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Answer {
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {} {}", self.stdout, self.stderr))
    }

    #[track_caller]
    pub fn exits_with(self, code: i32) -> Self {
        assert_eq!(self.code, code, "stdout: {}\nstderr: {}", self.stdout, self.stderr);
        self
    }
}

pub fn command(url: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tasker"));
    command
        .args(arguments)
        .env("DATABASE_URL", url)
        .env_remove("TRACEPARENT")
        .env_remove("OTEL_EXPORTER_OTLP_ENDPOINT");
    command.env("USER", "ada").env("NO_COLOR", "1").stdin(Stdio::null());
    command
}

/// A command that needs no database: it fails if it looks for one.
pub fn offline(arguments: &[&str]) -> Answer {
    run(&mut command("postgresql://nobody@127.0.0.1:1/nothing", arguments))
}

pub fn run(command: &mut Command) -> Answer {
    let output = command.output().expect("the command starts");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    Answer { code: output.status.code().expect("no signal"), stdout: text(output.stdout), stderr: text(output.stderr) }
}

pub struct Shop {
    pub database: TestDatabase,
    pub conn: PgConnection,
}

impl Shop {
    pub async fn new() -> Self {
        let database = TestDatabase::fresh().await;
        let mut conn = PgConnection::connect(&database.url()).await.unwrap();
        let checked = template::parse("order.yaml", TEMPLATE).unwrap();
        templates::register(&mut conn, &checked).await.unwrap();
        Self { database, conn }
    }

    pub fn tasker(&self, arguments: &[&str]) -> Answer {
        run(&mut command(&self.database.url(), arguments))
    }

    pub fn json(&self, arguments: &[&str]) -> Value {
        self.tasker(&[arguments, &["-o", "json"]].concat()).exits_with(0).json()
    }

    pub async fn sql(&mut self, statement: &str) {
        sqlx::query(AssertSqlSafe(statement.to_owned())).execute(&mut self.conn).await.unwrap();
    }
}

/// `tasker up`, told to stop when the test is done with it.
pub struct Up {
    pub child: Child,
    pub lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Up {
    pub fn start(shop: &Shop) -> Self {
        let mut child = command(&shop.database.url(), &["up", "-o", "json"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("tasker up");
        let stderr = BufReader::new(child.stderr.take().expect("piped"));
        // A pipe that nobody reads would fill up, so it is read to its end.
        let (ready, is_ready) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                if line.starts_with("worker") {
                    let _ = ready.send(());
                }
            }
        });
        is_ready.recv().expect("`tasker up` starts a worker");
        let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        Self { child, lines }
    }

    pub fn next_line(&mut self) -> Value {
        serde_json::from_str(&self.lines.next().expect("a line").unwrap()).unwrap()
    }

    pub fn stop(mut self) -> i32 {
        let id = i32::try_from(self.child.id()).ok().filter(|id| *id > 1).and_then(rustix::process::Pid::from_raw);
        rustix::process::kill_process(id.expect("the id of a child"), rustix::process::Signal::TERM).unwrap();
        self.child.wait().unwrap().code().expect("it ends by itself")
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
