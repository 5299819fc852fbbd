//! What the command line itself says: help, exit codes, templates, the schema.

use serde_json::json;
use tasker_shared::store::templates;
use tasker_shared::template;
use tasker_testing::TestDatabase;

use crate::shop::{Shop, TEMPLATE, command, offline, run};

#[test]
fn help_names_every_noun_and_every_exit_code() {
    insta::assert_snapshot!(offline(&["--help"]).exits_with(0).stdout);
}

#[test]
fn version_names_the_commit_it_was_built_from() {
    let version: serde_json::Value =
        serde_json::from_str(&offline(&["version", "-o", "json"]).exits_with(0).stdout).expect("JSON");
    assert_eq!(version["version"], env!("CARGO_PKG_VERSION"));
    let commit = version["commit"].as_str().expect("a commit");
    // Our tests run in a git checkout, also in CI.
    assert!(commit.len() == 40 && commit.chars().all(|c| c.is_ascii_hexdigit()), "{commit}");
    let date = version["commit_date"].as_str().expect("a date");
    assert!(date.parse::<chrono::NaiveDate>().is_ok(), "{date}");
    let text = offline(&["version"]).exits_with(0).stdout;
    assert!(text.contains(commit) && text.contains(date), "{text}");
}

#[test]
fn every_verb_has_help_with_examples() {
    for arguments in [
        "demo",
        "up",
        "orchestrator run",
        "worker run",
        "template",
        "task",
        "task submit",
        "task list",
        "schedule",
        "schedule set",
        "retention",
        "trace show",
        "queue",
        "limit",
        "migrate",
        "db",
        "version",
    ] {
        let words: Vec<&str> = arguments.split(' ').chain(["--help"]).collect();
        let help = offline(&words).exits_with(0).stdout;
        assert!(help.contains("Examples:\n  ") || help.contains("Examples:"), "{arguments}: {help}");
        assert!(help.lines().all(|line| line.chars().count() <= 125), "{arguments}: {help}");
    }
}

#[test]
fn a_wrong_command_line_exits_with_2() {
    for arguments in [
        &["tusk"][..],
        &["task"],
        &["task", "submit", "order"],
        &["task", "list", "--status", "nice"],
        &["task", "wait", "x", "--timeout", "30"],
        &["task", "submit", "shop/order", "--input", "{"],
        &["trace", "show", "x", "--tree", "--json"],
    ] {
        let answer = offline(arguments).exits_with(2);
        assert!(!answer.stderr.is_empty() && answer.stdout.is_empty(), "{arguments:?}");
    }
}

#[test]
fn what_says_nothing_is_told_every_flag_that_would() {
    for (arguments, flags) in [
        (&["limit", "set", "shop"][..], &["--concurrency", "--rate", "--per", "--open-tasks", "--handler"][..]),
        (&["retention", "set", "--namespace", "shop"], &["--keep", "--quarantine", "retention unset"]),
        (&["task", "cancel", "--dry-run"], &["--namespace", "--template", "--status"]),
        (&["schedule", "set", "shop/x", "--template", "t"], &["--cron", "--every", "--at"]),
    ] {
        let said = offline(arguments).exits_with(2).stderr;
        assert!(flags.iter().all(|flag| said.contains(flag)), "{arguments:?}: {said}");
    }
}

#[test]
fn an_unreachable_database_exits_with_4_and_says_why() {
    let answer = offline(&["task", "list"]).exits_with(4);
    assert!(
        answer.stderr.contains("the database cannot be reached") && answer.stderr.contains("refused"),
        "{}",
        answer.stderr
    );
}

#[test]
fn the_schema_of_a_template_is_printed_for_editors() {
    let schema = offline(&["template", "schema"]).exits_with(0).json();
    assert_eq!(schema["$schema"], "https://json-schema.org/draft/2020-12/schema");
    assert_eq!(schema["additionalProperties"], false);
    let concurrency = &schema["properties"]["concurrency"];
    assert_eq!(concurrency["properties"]["key"]["type"], "string");
    assert!(concurrency["description"].as_str().unwrap().contains("in flight"));
}

#[test]
fn lint_names_file_line_and_key_of_every_problem() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("order.yaml");
    let bad = "namespace: shop\nname: order\nversion: \"1\"\nsteps:\n  - {name: a, handler: noop, depends_on: [b]}\n  - {name: c, handlers: noop}\n";
    std::fs::write(&path, bad).unwrap();
    let path = path.to_str().unwrap();
    let answer = offline(&["template", "lint", path]).exits_with(1);
    let lines: Vec<&str> = answer.stdout.lines().collect();
    assert!(
        lines[0].starts_with(&format!("{path}:5:"))
            && lines[0].contains("steps[0].depends_on[0]")
            && lines[0].contains("`b`"),
        "{lines:?}"
    );
    assert!(lines.iter().any(|line| line.starts_with(&format!("{path}:6:")) && line.contains("handlers")), "{lines:?}");

    let problems = offline(&["template", "lint", path, "-o", "json"]).exits_with(1).json();
    assert_eq!(problems["ok"], false);
    assert_eq!(problems["problems"].as_array().unwrap().len(), lines.len());
    let first = &problems["problems"][0];
    assert_eq!(
        (&first["file"], &first["line"], &first["key"]),
        (&json!(path), &json!(5), &json!("steps[0].depends_on[0]"))
    );

    std::fs::write(path, TEMPLATE).unwrap();
    let answer = offline(&["template", "lint", path]).exits_with(0);
    assert!(answer.stdout.ends_with("ok, shop/order 1 with 2 steps\n"), "{}", answer.stdout);
    assert_eq!(
        offline(&["template", "lint", path, "-o", "json"]).exits_with(0).json(),
        json!({"ok": true, "problems": []})
    );
}

#[test]
fn the_schema_is_printed_without_a_database() {
    let sql = offline(&["migrate", "--print"]).exits_with(0).stdout;
    for part in ["create table tasker.tasks", "create function tasker.submit_task"] {
        assert!(sql.contains(part), "{part} is missing");
    }
}

#[tokio::test]
async fn a_database_without_a_schema_is_migrated_once() {
    let database = TestDatabase::empty().await;
    let migrate = || run(&mut command(&database.url(), &["migrate", "-o", "json"])).exits_with(0).json();
    assert!(migrate()["applied"].as_array().unwrap().len() > 3);
    assert_eq!(migrate()["applied"], json!([]));
    let listed = run(&mut command(&database.url(), &["task", "list", "-o", "json"])).exits_with(0).json();
    assert_eq!(listed, json!([]));
}

#[tokio::test]
async fn what_does_not_exist_exits_with_3() {
    let shop = Shop::new().await;
    let nobody = "00000000-0000-7000-8000-000000000000";
    for arguments in [
        &["task", "get", nobody][..],
        &["task", "why", "ORD-unknown"],
        &["task", "wait", nobody],
        &["task", "cancel", nobody],
        &["trace", "show", nobody],
        &["template", "show", "shop/nothing"],
        &["template", "show", "shop/order@9"],
        &["queue", "quarantine", "requeue", "77"],
        &["queue", "quarantine", "discard", "77"],
    ] {
        shop.tasker(arguments).exits_with(3);
    }
}

#[tokio::test]
async fn a_registered_version_never_changes() {
    let shop = Shop::new().await;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("order.yaml");
    std::fs::write(&path, TEMPLATE).unwrap();
    let apply = ["template", "apply", path.to_str().unwrap()];
    assert_eq!(shop.json(&apply), json!([{"namespace": "shop", "name": "order", "version": "1", "is_new": false}]));
    std::fs::write(&path, TEMPLATE.replace("10ms", "20ms")).unwrap();
    let refused = shop.tasker(&apply).exits_with(1);
    assert!(refused.stderr.contains("give this one a new version"), "{}", refused.stderr);
    assert_eq!(shop.json(&["template", "list"]).as_array().unwrap().len(), 1);
    assert_eq!(shop.json(&["template", "show", "shop/order"])["name"], "order");
}

#[test]
fn every_schedule_file_of_the_examples_is_a_schedule() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/schedules");
    let mut count = 0;
    for file in std::fs::read_dir(folder).unwrap() {
        let text = std::fs::read_to_string(file.unwrap().path()).unwrap();
        let schedule = tasker_shared::schedule::Schedule::from_yaml(&text).unwrap();
        schedule.timing("2026-01-01T00:00:00Z".parse().unwrap()).unwrap();
        count += 1;
    }
    assert!(count > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_template_diff_says_what_changed() {
    let mut shop = Shop::new().await;
    let later = TEMPLATE
        .replace("version: \"1\"", "version: \"2\"")
        .replace("depends_on: [try], ", "")
        .replace("handler: echo, input: {try: \"${steps.try.output}\"}", "handler: noop");
    let checked = template::parse("order.yaml", &later).unwrap();
    templates::register(&mut shop.conn, &checked).await.unwrap();
    let text = shop.tasker(&["template", "diff", "shop/order", "1", "2"]).exits_with(0).stdout;
    assert!(text.contains("handler: \"echo\" → \"noop\"") && text.contains("- done depends on try"), "{text}");
    let json = shop.json(&["template", "diff", "shop/order", "2", "1"]);
    assert_eq!(json["edges_added"], json!([{"from": "try", "to": "done"}]));
    assert!(shop.tasker(&["template", "diff", "shop/order", "1", "1"]).exits_with(0).stdout.starts_with("nothing but"));
    shop.tasker(&["template", "diff", "shop/order", "1", "9"]).exits_with(3);
}
