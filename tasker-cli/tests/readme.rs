//! Every command of README.md and of docs/reference/api.md, run as a reader would, with a local PostgreSQL of its own.

use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

const README: &str = include_str!("../../README.md");
const BESIDE: &str = "<!-- runs beside the rest -->";

/// A `sh` block of the README.
struct Block {
    text: String,
    beside: bool,
}

fn blocks(readme: &str) -> Vec<Block> {
    let mut found = Vec::new();
    let mut lines = readme.lines();
    let mut beside = false;
    while let Some(line) = lines.next() {
        if line == "```sh" {
            let text: Vec<&str> = lines.by_ref().take_while(|line| *line != "```").collect();
            found.push(Block { text: text.join("\n"), beside });
        }
        beside = line == BESIDE;
    }
    found
}

/// A home below the system's temporary directory: everybody may enter it, as the account that
/// the server runs under when tests run as root must.
struct Home {
    path: PathBuf,
}

impl Home {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("tasker-{name}-{}", std::process::id()));
        std::fs::create_dir(&path).expect("a directory of our own");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("its mode");
        Self { path }
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        let _ = shell(&self.path, "tasker db stop --force").stdout(Stdio::null()).status();
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

/// bash in the root of the repository, with the commands that this build made in its PATH.
fn shell(home: &Path, script: &str) -> Command {
    let bin = Path::new(env!("CARGO_BIN_EXE_tasker")).parent().expect("a directory");
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new("bash");
    command.args(["-euo", "pipefail", "-c", script]).current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    command.env("PATH", format!("{}:{path}", bin.display())).env("TASKER_HOME", home).env("NO_COLOR", "1");
    for unset in ["DATABASE_URL", "TRACEPARENT", "OTEL_EXPORTER_OTLP_ENDPOINT"] {
        command.env_remove(unset);
    }
    command
}

/// Programs that run until they are told to stop, each in a process group of its own.
struct Beside(Vec<Child>);

impl Drop for Beside {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // A system call and no `kill` command: some of those read a group's number as "everybody".
            let group = i32::try_from(child.id()).ok().filter(|id| *id > 1).and_then(rustix::process::Pid::from_raw);
            let _ =
                rustix::process::kill_process_group(group.expect("the id of a child"), rustix::process::Signal::INT);
            let _ = child.wait();
        }
    }
}

#[test]
fn every_command_of_the_readme_does_what_it_says() {
    let psql =
        Command::new("psql").arg("--version").stdout(Stdio::null()).status().is_ok_and(|status| status.success());
    assert!(
        psql,
        "the README uses psql; install it to run this test (Debian, Ubuntu: `apt-get install postgresql-client`)"
    );
    let hello = Path::new(env!("CARGO_BIN_EXE_tasker")).with_file_name("examples").join("hello");
    assert!(hello.exists(), "cargo builds the examples of a package together with its tests");

    // Built already; cargo itself is not what is tested here.
    let readme = README
        .replace("cargo run -p tasker-cli -- ", "tasker ")
        .replace("cargo run -p tasker-cli --example hello --", &hello.display().to_string());
    let all = blocks(&readme);
    // Dropped in the opposite order: programs first, then the server and its directory.
    let home = Home::new("readme");
    let mut beside = Beside(Vec::new());
    let mut shown = String::new();
    for block in &all {
        if block.text == "cargo test --workspace" {
            continue;
        }
        assert!(!block.text.contains("cargo"), "this command would build something: {}", block.text);
        let mut command = shell(&home.path, &block.text);
        if block.beside {
            let child = command.stdout(Stdio::null()).stderr(Stdio::null()).process_group(0).spawn();
            beside.0.push(child.expect("bash starts"));
            continue;
        }
        let output = command.output().expect("bash starts");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{}\n{text}\n{}", block.text, String::from_utf8_lossy(&output.stderr));
        shown.push_str(&text);
    }
    assert_eq!((all.len(), beside.0.len()), (8, 2), "every block of commands was found");

    for part in [
        "24 of 24 orders complete, 24 as expected",
        "hello/greeting 1.0.0 registered",
        "completed  HELLO-1",
        "trace 4bf92f3577b34da6a3ce929d0e0e4736  correlation_id HELLO-1",
        "✗ NotAwake: try again in a second",
        "step.wait retry of greet",
        "step.execution count attempt 1/3",
        "\"letters\": 8",
    ] {
        assert!(shown.contains(part), "{part} is missing:\n{shown}");
    }
}

/// The commands of `console` blocks, each with the output that stands below it.
fn commands(manual: &str) -> Vec<(String, String)> {
    let mut found: Vec<(String, String)> = Vec::new();
    for block in manual.split("```console\n").skip(1) {
        let mut goes_on = false;
        for line in block.lines().take_while(|line| *line != "```") {
            match (line.strip_prefix("$ "), found.last_mut()) {
                (Some(command), _) => found.push((command.to_owned(), String::new())),
                (None, Some((command, _))) if goes_on => {
                    command.push('\n');
                    command.push_str(line);
                }
                (None, Some((_, output))) => {
                    output.push_str(line);
                    output.push('\n');
                }
                (None, None) => panic!("output of no command: {line}"),
            }
            goes_on = found.last().is_some_and(|(command, output)| output.is_empty() && command.ends_with('\\'));
        }
    }
    found
}

/// Whether the output is what the manual shows, in which `…` stands for anything.
fn is_like(output: &str, shown: &str) -> bool {
    let ended = |text: &str| format!("{}\n", text.trim_end());
    let (output, shown) = (ended(output), ended(shown));
    let open = shown.ends_with("…\n");
    let mut rest = output.as_str();
    let parts: Vec<&str> = shown.trim_end_matches("…\n").split('…').collect();
    for (place, part) in parts.iter().enumerate() {
        match rest.find(part) {
            Some(at) if place > 0 || at == 0 => rest = &rest[at + part.len()..],
            _ => return false,
        }
    }
    rest.is_empty() || open
}

#[test]
fn every_command_of_the_api_manual_answers_what_it_says() {
    assert!(is_like("abc", "a…c") && is_like("abc", "a…") && !is_like("abc", "a…b") && !is_like("abc", "bc"));
    let manual = include_str!("../../docs/reference/api.md");
    let home = Home::new("api-manual");
    let template = "namespace: shop\nname: order\nversion: '1'\nsteps: [{name: charge, handler: shop.charge}]";
    let apply = format!(
        "cat >$TASKER_HOME/order.yaml <<'YAML'\n{template}\nYAML\ntasker template apply $TASKER_HOME/order.yaml"
    );
    assert!(shell(&home.path, &apply).stdout(Stdio::null()).status().expect("bash starts").success());
    let mut serve = shell(&home.path, "exec tasker api run --listen 127.0.0.1:0");
    let mut beside = Beside(vec![serve.stderr(Stdio::piped()).process_group(0).spawn().expect("bash starts")]);
    let said = BufReader::new(beside.0[0].stderr.take().expect("its messages"));
    let open = said.lines().map_while(Result::ok).find(|line| line.starts_with("open ")).expect("where it listens");
    let url = open.split_whitespace().nth(1).and_then(|link| link.split("/login").next()).expect("a URL").to_owned();

    let all = commands(manual);
    assert!(all.iter().filter(|(command, _)| command.starts_with("curl ")).count() >= 7, "{all:?}");
    // What a reader copies from an answer.
    let (mut key, mut task) = (String::new(), String::new());
    for (command, shown) in &all {
        if command.starts_with("KEY=") || command.starts_with("TASK=") {
            assert!(command.ends_with('…') && shown.is_empty(), "{command} {shown}");
            continue;
        }
        let silent = command.replace("curl ", "curl -sS ").replace("http://127.0.0.1:7878", &url);
        let output = shell(&home.path, &silent).env("KEY", &key).env("TASK", &task).output().expect("bash starts");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let fine = output.status.success() || command.contains("--max-time");
        let problem = String::from_utf8_lossy(&output.stderr);
        assert!(fine && is_like(&text, shown), "{command}\nanswers {text}{problem}\nand should {shown}");
        if command.starts_with("tasker key create") {
            key = text.trim().to_owned();
        }
        if let Some(rest) = text.strip_prefix("{\"task_uuid\":\"") {
            rest.split('"').next().expect("a uuid").clone_into(&mut task);
        }
    }
    assert!(!key.is_empty() && !task.is_empty(), "the manual makes a key and submits a task");
    drop(beside);
}

#[test]
fn the_handler_in_the_readme_is_the_one_of_the_example() {
    let example = include_str!("../../examples/hello/main.rs");
    let handler = README.split("```rust\n").nth(1).and_then(|rest| rest.split("```").next()).expect("a rust block");
    // However it is indented.
    let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(words(example).contains(&words(handler)), "{handler}");
}

#[test]
fn files_that_the_readme_names_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the repository");
    let links: Vec<&str> = README
        .split("](")
        .skip(1)
        .filter_map(|rest| rest.split(')').next())
        .filter(|link| !link.contains("://"))
        .collect();
    assert!(links.len() >= 3, "{links:?}");
    for link in links {
        let (file, place) = link.split_once('#').unwrap_or((link, ""));
        let text = std::fs::read_to_string(root.join(file)).unwrap_or_default();
        assert!(root.join(file).exists(), "{link}");
        let is_there = |line: &str| line.trim_start_matches(['#', ' ']).to_lowercase().replace(' ', "-") == place;
        assert!(place.is_empty() || text.lines().filter(|line| line.starts_with('#')).any(is_there), "{link}");
    }
}
