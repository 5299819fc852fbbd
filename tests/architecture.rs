//! What may import what, and who may begin a transaction: read from the sources.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace")
}

/// Every file below a folder with one of these endings.
fn files(folder: &str, endings: &[&str]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![root().join(folder)];
    while let Some(path) = open.pop() {
        if path.is_dir() {
            let entries = std::fs::read_dir(&path).expect("a folder of the workspace can be read");
            open.extend(entries.map(|entry| entry.expect("an entry").path()));
        } else if endings.iter().any(|ending| path.extension().is_some_and(|found| found == *ending)) {
            found.push(path);
        }
    }
    assert!(!found.is_empty(), "nothing to look at in {folder}");
    found
}

/// Lines of code: comments say what they like.
fn code(path: &Path) -> Vec<(usize, String)> {
    let text = std::fs::read_to_string(path).expect("a source file can be read");
    let lines = (1..).zip(text.lines()).filter(|(_, line)| !line.trim_start().starts_with("//"));
    lines.map(|(number, line)| (number, line.to_owned())).collect()
}

/// Fails with each line for which `says` names what is wrong with it.
fn nowhere(files: &[PathBuf], says: impl Fn(&Path, &str) -> Option<&'static str>) {
    let mut wrong = Vec::new();
    for path in files {
        let name = path.strip_prefix(root()).expect("it is in the workspace");
        for (number, line) in code(path) {
            if let Some(problem) = says(name, &line) {
                wrong.push(format!("{}:{number}: {problem}: {}", name.display(), line.trim()));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

fn is_impure(line: &str) -> Option<&'static str> {
    const NEVER: [&str; 8] =
        ["sqlx", "tokio", "tracing", "opentelemetry", "Utc::now", "SystemTime", "Instant", "rand::"];
    let ours = line.split("crate::").skip(1).any(|rest| !rest.starts_with("state_machine"));
    if ours || line.contains("super::super::super::super::") {
        return Some("the core imports nothing of ours");
    }
    NEVER.iter().any(|word| line.contains(word)).then_some("the core does no I/O and reads no clock")
}

#[test]
fn the_state_machine_is_pure() {
    nowhere(&files("tasker-shared/src/state_machine", &["rs"]), |_, line| is_impure(line));
}

#[test]
fn the_check_of_the_state_machine_finds_what_it_looks_for() {
    for bad in ["use crate::store::Error;", "use sqlx::PgPool;", "let now = Utc::now();", "std::time::Instant::now()"] {
        assert!(is_impure(bad).is_some(), "{bad}");
    }
    assert_eq!(is_impure("use crate::state_machine::plan::Plan;"), None);
}

#[test]
fn orchestration_and_worker_never_import_each_other() {
    nowhere(&files("tasker-orchestration", &["rs", "toml"]), |_, line| {
        (line.contains("tasker_worker") || line.contains("tasker-worker")).then_some("they meet in messages")
    });
    nowhere(&files("tasker-worker", &["rs", "toml"]), |_, line| {
        (line.contains("tasker_orchestration") || line.contains("tasker-orchestration"))
            .then_some("they meet in messages")
    });
}

#[test]
fn the_api_runs_nothing_and_its_routes_write_no_sql() {
    nowhere(&files("tasker-api", &["rs", "toml"]), |name, line| {
        let in_manifest = name.extension().is_some_and(|ending| ending == "toml");
        let process = if in_manifest {
            ["tasker-worker", "tasker-orchestration"]
        } else {
            ["tasker_worker::", "tasker_orchestration::"]
        };
        if process.iter().any(|name| line.contains(name)) {
            return Some("it asks the database; the processes read its requests there");
        }
        None
    });
    // The statements of its lists stand beside it, in files of their own.
    let statements =
        ["auth/keys.rs", "gauges.rs", "page/rows.rs", "sampling.rs"].map(|file| Path::new("tasker-api/src").join(file));
    nowhere(&files("tasker-api/src", &["rs"]), |name, line| {
        (line.contains("sqlx::query") && !statements.iter().any(|file| file == name))
            .then_some("statements are in tasker-shared/src/store, or in the files named here")
    });
    for path in statements {
        assert!(
            code(&root().join(&path)).iter().any(|(_, line)| line.contains("sqlx::query")),
            "{} has none",
            path.display()
        );
    }
}

#[test]
fn only_tx_begins_transactions() {
    // A migration runs before there is anything to protect, on a connection of its own.
    let may =
        ["tasker-shared/src/store/tx.rs", "tasker-shared/src/migrate.rs", "tasker-shared/src/migrate/installed.rs"]
            .map(Path::new);
    let begins = |line: &str| {
        let line = line.to_lowercase();
        [".begin()", ".begin_with(", "\"begin\"", "\"begin;", "start transaction"]
            .iter()
            .any(|word| line.contains(word))
    };
    let sources: Vec<PathBuf> = [
        "tasker-shared/src",
        "tasker-orchestration/src",
        "tasker-worker/src",
        "tasker-api/src",
        "tasker-cli/src",
        "tools",
    ]
    .into_iter()
    .flat_map(|folder| files(folder, &["rs", "sql"]))
    .collect();
    nowhere(&sources, |name, line| {
        (begins(line) && !may.contains(&name)).then_some("only store/tx.rs begins transactions")
    });
    for path in may {
        assert!(code(&root().join(path)).iter().any(|(_, line)| begins(line)), "{} begins none", path.display());
    }
}

/// The variables of ours that a text names.
fn variables(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !(c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_'));
    words.filter(|word| word.starts_with("TASKER_") && !word.ends_with('_')).map(str::to_owned).collect()
}

#[test]
fn every_variable_that_is_read_is_documented_and_the_other_way_round() {
    let of = |paths: Vec<PathBuf>| -> BTreeSet<String> {
        let lines = paths.iter().flat_map(|path| code(path)).map(|(_, line)| line);
        lines.flat_map(|line| variables(&line)).collect()
    };
    let sources =
        ["tasker-shared/src", "tasker-orchestration/src", "tasker-worker/src", "tasker-api/src", "tasker-cli/src"];
    let product = sources.iter().flat_map(|folder| files(folder, &["rs"])).filter(|path| !path.ends_with("tests.rs"));
    let read = of(product.collect());
    let tests = of([files("tests", &["rs"]), files("scripts", &["sh"])].concat());
    let documented = of([files("docs", &["md"]), vec![root().join("README.md")]].concat());
    let missing: Vec<_> = read.difference(&documented).collect();
    assert!(missing.is_empty(), "read, and in no document: {missing:?}");
    let stale: Vec<_> = documented.iter().filter(|name| !read.contains(*name) && !tests.contains(*name)).collect();
    assert!(stale.is_empty(), "documented, and read by nobody: {stale:?}");
    assert!(read.contains("TASKER_HOME"), "the sources were read");
}

#[test]
fn the_table_of_telemetry_names_every_row_and_what_shows_it() {
    let text = std::fs::read_to_string(root().join("docs/reference/trace-checklist.md")).expect("the document");
    let (_, table) = text.split_once("# What traced workflow systems are asked for").expect("the table");
    let mut named: BTreeMap<String, BTreeSet<u32>> = BTreeMap::new();
    for line in table.lines().filter(|line| line.starts_with("| 0")) {
        let cells: Vec<&str> = line.split(" | ").collect();
        let [ids, lives, shown] = cells[..] else { panic!("three cells: {line}") };
        assert!(!lives.trim().is_empty() && !shown.trim_matches([' ', '|']).is_empty(), "an empty cell: {line}");
        for id in ids.trim_start_matches("| ").split(", ") {
            let id = id.split(" (").next().unwrap_or_default();
            let (group, numbers) = id.split_once('-').unwrap_or_else(|| panic!("{id} is no id"));
            let (first, last) = numbers.split_once('…').unwrap_or((numbers, numbers));
            let number = |text: &str| text.parse::<u32>().unwrap_or_else(|_| panic!("{id} is no id"));
            named.entry(group.to_owned()).or_default().extend(number(first)..=number(last));
        }
    }
    let expected = [("000", 55), ("001", 53), ("003", 52), ("004", 67)];
    let expected: BTreeMap<String, BTreeSet<u32>> =
        expected.map(|(group, last)| (group.to_owned(), (1..=last).collect())).into();
    assert_eq!(named, expected);
}

/// What stands between backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

#[test]
fn each_row_of_the_features_names_a_test_and_examples_that_exist() {
    let document = std::fs::read_to_string(root().join("docs/reference/features.md")).expect("the document");
    let folders = [
        "tests",
        "tasker-shared/src",
        "tasker-orchestration/src",
        "tasker-testing",
        "tasker-worker",
        "tasker-api",
        "tasker-cli",
    ];
    let sources: Vec<PathBuf> = folders.into_iter().flat_map(|folder| files(folder, &["rs"])).collect();
    let tests: Vec<(String, String)> = sources
        .iter()
        .map(|path| (path.display().to_string(), std::fs::read_to_string(path).expect("a source file can be read")))
        .filter(|(_, source)| source.contains("#[test]") || source.contains("#[tokio::test"))
        .collect();
    let exists = |name: &str| match name.split_once("::") {
        Some((file, test)) => {
            tests.iter().any(|(path, source)| path.contains(file) && source.contains(&format!("fn {test}(")))
        }
        None => tests.iter().any(|(path, _)| path.ends_with(&format!("/{name}"))),
    };
    let rows: Vec<&str> =
        document.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| feature")).collect();
    assert!(rows.len() > 20, "the table is gone");
    for row in rows {
        let cells: Vec<&str> = row.split(" | ").collect();
        let [feature, how, _, shown] = cells[..] else { panic!("four cells: {row}") };
        let tests: Vec<&str> = quoted(shown).collect();
        assert!(!tests.is_empty(), "{feature}: no test shows it");
        for name in tests {
            assert!(exists(name), "{feature}: there is no test {name}");
        }
        for example in quoted(how).filter(|name| name.starts_with("examples/")) {
            assert!(root().join(example).is_file(), "{feature}: there is no {example}");
        }
    }
}

#[test]
fn a_crate_carries_what_its_statements_and_migrations_compile_from() {
    let same = |link: PathBuf, top: &str| {
        let top = root().join(top).canonicalize().expect("a folder at the top");
        assert_eq!(link.canonicalize().ok(), Some(top), "{} must be a symbolic link to it", link.display());
    };
    for name in ["tasker-shared", "tasker-orchestration", "tasker-worker", "tasker-api", "tasker-cli", "tasker-testing"]
    {
        let sources = files(&format!("{name}/src"), &["rs"]);
        let found = |what: &[&str]| {
            sources.iter().flat_map(|path| code(path)).any(|(_, line)| what.iter().any(|what| line.contains(what)))
        };
        if found(&["query!(", "query_as!(", "query_scalar!(", "query_file!(", "query_file_as!(", "query_file_scalar!("])
        {
            same(root().join(name).join(".sqlx"), ".sqlx");
        }
        if found(&["migrate!("]) {
            same(root().join(name).join("migrations"), "migrations");
        }
    }
}
