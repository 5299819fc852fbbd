//! `docs/reference/worker-protocol.md` says what the database does, and `docs/guides/worker-in-python.md` how to use it.

use std::process::Stdio;

use serde_json::json;
use sqlx::{AssertSqlSafe, Connection as _, Executor as _, PgConnection};

use crate::bench::{Bench, step};

const DOCUMENT: &str = include_str!("../../docs/reference/worker-protocol.md");
const PYTHON: &str = include_str!("../../docs/guides/worker-in-python.md");
const FUNCTIONS: [&str; 6] =
    ["claim_steps", "heartbeat", "report_results", "step_output", "worker_bye", "worker_hello"];

/// The fenced blocks of one kind.
fn blocks(kind: &str) -> Vec<&'static str> {
    let fence = format!("```{kind}\n");
    DOCUMENT.split(fence.as_str()).skip(1).map(|rest| rest.split("```").next().expect("an end").trim()).collect()
}

#[tokio::test]
async fn the_document_shows_the_signatures_that_the_database_has() {
    let bench = Bench::new().await;
    let mut has: Vec<String> = sqlx::query_scalar(
        "select format('tasker.%s(%s) returns %s', p.proname, pg_get_function_arguments(p.oid), pg_get_function_result(p.oid))
         from pg_proc p where p.pronamespace = 'tasker'::regnamespace and p.proname = any($1)",
    )
    .bind(FUNCTIONS.map(str::to_owned).to_vec())
    .fetch_all(&bench.pool)
    .await
    .expect("the catalog");
    has.sort_unstable();
    let mut shown = blocks("sql signature");
    shown.sort_unstable();
    assert_eq!(shown, has);
}

#[tokio::test]
async fn the_pass_in_sql_works_for_a_role_with_nothing_but_the_grants_shown() {
    let bench = Bench::new().await;
    let (_, steps) =
        bench.enqueue(&[step("shout", json!({"text": "hey"})), step("shout", json!({"text": "ho"}))]).await;
    // Roles belong to the whole server, so each run has its own.
    let role = format!("shop_worker_{}", steps[0].simple());
    let grants = blocks("sql grants")[0].replace("shop_worker", &role);
    bench.pool.execute(AssertSqlSafe(format!("create role {role}; {grants}"))).await.expect("the grants");
    let mut session = PgConnection::connect(&bench.db.url()).await.expect("a session");
    session.execute(AssertSqlSafe(format!("set session authorization {role}"))).await.expect("the role");
    let denied = session.execute("select from tasker.steps").await.expect_err("a table of ours");
    let passed = session.execute(blocks("sql pass")[0]).await;
    let elsewhere = session
        .execute("select * from tasker.claim_steps('other', null, 'w', '{shout}', 1)")
        .await
        .expect_err("not its own");
    session.close().await.expect("closed");
    bench.pool.execute(AssertSqlSafe(format!("drop owned by {role}; drop role {role}"))).await.expect("tidied up");

    passed.expect("the pass");
    assert!(denied.to_string().contains("permission denied"), "{denied}");
    assert!(elsewhere.to_string().contains("namespace: this role may not use it"), "{elsewhere}");
    for (step, said) in steps.into_iter().zip(["HEY", "HO"]) {
        assert_eq!(bench.attempt(step).await.output, Some(json!({"said": said})));
    }
}

#[tokio::test]
async fn the_worker_in_python_works() {
    // The driver is the reader's choice, not a dependency of ours; `TASKER_TEST_PYTHON` names a
    // Python that has it.
    let python = std::env::var("TASKER_TEST_PYTHON").unwrap_or_else(|_| "python3".into());
    let has_driver = std::process::Command::new(&python).args(["-c", "import psycopg"]).stderr(Stdio::null()).status();
    if !has_driver.is_ok_and(|status| status.success()) {
        eprintln!("not run: {python} has no psycopg");
        return;
    }
    let bench = Bench::new().await;
    let slow = crate::bench::Step { lease_ms: 150, ..step("shout", json!({"text": "hey"})) };
    let (_, steps) = bench.enqueue(&[slow, step("shout", json!({"wrong": 1}))]).await;
    let program = PYTHON.split("```python\n").nth(1).and_then(|rest| rest.split("```").next()).expect("the program");
    let mut worker = tokio::process::Command::new(&python)
        .args(["-c", program])
        .env("DATABASE_URL", bench.db.url())
        .kill_on_drop(true)
        .spawn()
        .expect("python");
    assert_eq!(bench.reported(steps[0]).await.output, Some(json!({"said": "HEY"})));
    assert_eq!(bench.reported(steps[1]).await.error.expect("an error")["type"], "KeyError");
    let interrupted =
        std::process::Command::new("kill").args(["-INT", &worker.id().expect("running").to_string()]).status();
    assert!(interrupted.expect("kill").success());
    bench.until("select count(*) = 0 from tasker.workers").await;
    assert!(worker.wait().await.expect("ended").success());
}
