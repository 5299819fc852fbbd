//! Whose fault it is: what the database answers to everybody alike never counts against a message,
//! and what one message alone provokes costs that message.

use serde_json::{Value, json};
use sqlx::AssertSqlSafe;
use tasker_orchestration::{Options, Orchestrator};
use tasker_shared::metrics;
use tasker_shared::store::{Error, Fault};
use tasker_tests::trace_config;
use uuid::Uuid;

use crate::harness::{Setup, World, eventually};

/// Runs statements, one after another.
async fn run(world: &World, statements: &[&str]) {
    for statement in statements {
        sqlx::raw_sql(AssertSqlSafe(*statement)).execute(&world.pool).await.expect(statement);
    }
}

/// From now on the log refuses rows as the table `refusals` says, and a sequence counts how often.
async fn refuse_by_table(world: &World) {
    run(
        world,
        &[
            "create table public.refusals (code text not null, task uuid)",
            "create sequence public.refused",
            "create function public.refuse() returns trigger language plpgsql as $$
             declare v_code text;
             begin
               -- What workers write is not what is looked at here.
               if new.event in ('Claim', 'Report') then
                 return new;
               end if;
               select r.code into v_code from public.refusals r where coalesce(r.task, new.task_uuid) = new.task_uuid limit 1;
               if v_code is not null then
                 perform nextval('public.refused');
                 raise exception 'refused for the test' using errcode = v_code;
               end if;
               return new;
             end $$",
            "create trigger refuse before insert on tasker.transitions for each row execute function public.refuse()",
        ],
    )
    .await;
}

async fn refused(world: &World, at_least: i64) {
    eventually(&format!("it was refused {at_least} times"), async || (tries(world).await >= at_least).then_some(()))
        .await;
}

async fn tries(world: &World) -> i64 {
    world.number("select case when is_called then last_value else 0 end from refused").await
}

async fn quarantined(world: &World) -> Vec<String> {
    world.words("select queue || ' ' || failures || ' ' || reason from tasker.quarantine").await
}

async fn several(world: &World, tasks: usize) -> Vec<Uuid> {
    world.register_steps("two", "a: ok\nb: ok <- a").await;
    let mut submitted = Vec::new();
    for _ in 0..tasks {
        submitted.push(world.submit("two").await);
    }
    submitted
}

/// All of them end as they should, and nothing of them was put aside.
async fn all_is_well(world: &World, tasks: &[Uuid]) {
    assert_eq!(world.finish(tasks).await, vec!["complete"; tasks.len()]);
    world.queues_drained().await;
    assert_eq!(quarantined(world).await, [""; 0]);
    world.assert_complete().await;
}

#[tokio::test]
async fn only_what_is_listed_blames_the_message() {
    let world = World::start(Setup { orchestrators: 0, workers: 0, ..Setup::default() }).await;
    for (fault, codes) in [
        (Fault::Message, ["22P02", "22023", "22021", "23505", "23503", "54000", "54001"].as_slice()),
        (Fault::Collision, &["40001", "40P01"]),
        (Fault::Locked, &["55P03"]),
        (
            Fault::System,
            &[
                "0A000", "25006", "26000", "42501", "42703", "42804", "42883", "42P01", "42P05", "53100", "53300",
                "55000", "57014", "57P01", "58030", "P0001", "XX000", "XX001",
            ],
        ),
    ] {
        for code in codes {
            let raise = format!("do $$ begin raise exception 'no' using errcode = '{code}'; end $$");
            let answer = sqlx::raw_sql(AssertSqlSafe(raise)).execute(&world.pool).await.expect_err("raised");
            assert_eq!(Error::from(answer).fault(), fault, "{code}");
        }
    }
    let decode = |source: &'static str| {
        Error::from(sqlx::Error::ColumnDecode { index: "x".into(), source: source.into() }).fault()
    };
    assert_eq!(decode("invalid digit found in string"), Fault::Message);
    let other = "mismatched types; Rust type `i32` (as SQL type `INT4`) is not compatible with SQL type `TEXT`";
    assert_eq!(decode(other), Fault::System);
    assert_eq!(Error::from(sqlx::Error::PoolTimedOut).fault(), Fault::System);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_blames_nobody_quarantines_nothing() {
    let world = World::start(Setup::default()).await;
    refuse_by_table(&world).await;
    let mut tasks = Vec::new();
    for code in ["0A000", "42804", "42501", "26000", "XX000", "25006", "42P05", "53100", "58030", "P0001", "42883"] {
        let before = tries(&world).await;
        run(&world, &[&format!("insert into refusals values ('{code}')")]).await;
        tasks.extend(several(&world, 2).await);
        // Three of each message's own would put it aside.
        refused(&world, before + 8).await;
        assert_eq!(quarantined(&world).await, [""; 0], "{code}");
        run(&world, &["delete from refusals"]).await;
    }
    all_is_well(&world, &tasks).await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grant_that_is_missing_for_a_while_quarantines_nothing() {
    let mut world = World::start(Setup { orchestrators: 0, ..Setup::default() }).await;
    // Roles belong to the whole server, so each run has its own.
    let role = format!("orchestrator_{}", Uuid::new_v4().simple());
    run(
        &world,
        &[
            &format!("create role {role}; grant usage, create on schema tasker, pgmq to {role}"),
            &format!("grant all on all tables in schema tasker, pgmq to {role}"),
            &format!("grant all on all sequences in schema tasker, pgmq to {role}"),
            &format!("grant execute on all functions in schema tasker, pgmq to {role}"),
        ],
    )
    .await;
    let url = format!("{}{}options[role]={role}", world.url, if world.url.contains('?') { '&' } else { '?' });
    let options = Options { trace: trace_config(&world.receiver.endpoint(), "grpc"), ..Options::default() };
    world.orchestrators.push(Orchestrator::start(&url, &options).await.expect("an orchestrator"));
    let mut tasks = several(&world, 20).await;
    assert_eq!(world.finish(&tasks).await, vec!["complete"; tasks.len()]);

    run(&world, &[&format!("revoke insert on tasker.transitions from {role}")]).await;
    tasks.extend(several(&world, 20).await);
    let mut paused = 0;
    eventually("it waits, and says so", async || {
        assert_eq!(quarantined(&world).await, [""; 0]);
        let text = metrics::text().await;
        let line = text.lines().find(|line| line.starts_with("tasker_settling_paused"))?;
        paused += i32::from(!line.ends_with(" 0"));
        (paused > 50).then_some(())
    })
    .await;
    run(&world, &[&format!("grant insert on tasker.transitions to {role}")]).await;
    all_is_well(&world, &tasks).await;
    let database = world.pool.clone();
    world.orchestrators.pop().expect("one").shutdown(crate::harness::DEADLINE).await;
    sqlx::raw_sql(AssertSqlSafe(format!("drop owned by {role}; drop role {role}")))
        .execute(&database)
        .await
        .expect("tidied up");
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_that_no_longer_fits_costs_a_connection_and_no_message() {
    let world = World::start(Setup { orchestrators: 2, ..Setup::default() }).await;
    let mut tasks = several(&world, 20).await;
    assert_eq!(world.finish(&tasks).await, vec!["complete"; tasks.len()]);
    for kind in ["varchar(600)", "text"] {
        run(&world, &[&format!("alter table tasker.tasks alter column error_type type {kind}")]).await;
        tasks.extend(several(&world, 20).await);
        assert_eq!(world.finish(&tasks).await, vec!["complete"; tasks.len()]);
    }
    all_is_well(&world, &tasks).await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upgrade_of_the_schema_in_the_middle_of_a_load_quarantines_nothing() {
    let world = World::start(Setup { orchestrators: 2, ..Setup::default() }).await;
    let mut tasks = several(&world, 20).await;
    // What a careless upgrade does in several transactions: for a moment something is not there.
    run(
        &world,
        &[
            "alter table tasker.tasks add column upgraded int default 1",
            "alter table tasker.steps add column upgraded int default 1",
            "alter function tasker.conclude rename to conclude_of_before",
        ],
    )
    .await;
    tasks.extend(several(&world, 20).await);
    let failed = "select count(*) from tasker.message_failures";
    eventually("messages came several times, and none of them is blamed", async || {
        let read = world.number("select coalesce(sum(read_ct), 0)::bigint from pgmq.q_task_requests").await;
        assert_eq!(world.number(failed).await, 0);
        (read > 0).then_some(())
    })
    .await;
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    assert_eq!(world.number(failed).await, 0);
    run(
        &world,
        &[
            "alter table tasker.tasks alter column error_type type varchar(600)",
            "alter function tasker.conclude_of_before rename to conclude",
            "create index on tasker.tasks (upgraded)",
        ],
    )
    .await;
    tasks.extend(several(&world, 20).await);
    all_is_well(&world, &tasks).await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_message_alone_provokes_puts_off_that_message() {
    let world = World::start(Setup::by_hand()).await;
    refuse_by_table(&world).await;
    world.register_steps("one", "a: ok").await;
    let bad = world.submit("one").await;
    let claim = world.claim().await;
    run(&world, &[&format!("insert into refusals values ('XX000', '{bad}')")]).await;
    assert_eq!(world.report(&claim, &tasker_tests::worker::Answer::Success(json!({}))).await, (true, false));
    refused(&world, 1).await;
    let mut good = Vec::new();
    for _ in 0..10 {
        let task = world.submit("one").await;
        let claim = world.claim().await;
        world.succeed(&claim).await;
        good.push(task);
    }
    assert_eq!(world.finish(&good).await, vec!["complete"; good.len()]);
    // It comes again, ever more rarely.
    refused(&world, 4).await;
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    assert!(tries(&world).await < 12, "{}", tries(&world).await);
    assert_eq!(quarantined(&world).await, [""; 0]);
    run(&world, &["delete from refusals"]).await;
    assert_eq!(world.finish(&[bad]).await, ["complete"]);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_whose_own_data_is_refused_three_times_is_quarantined() {
    let world = World::start(Setup::by_hand()).await;
    refuse_by_table(&world).await;
    world.register_steps("one", "a: ok").await;
    for code in ["22P02", "23505", "54000"] {
        let bad = world.submit("one").await;
        let claim = world.claim().await;
        run(&world, &[&format!("insert into refusals values ('{code}', '{bad}')")]).await;
        world.report(&claim, &tasker_tests::worker::Answer::Success(Value::Null)).await;
        let found = eventually("it is put aside", async || quarantined(&world).await.pop()).await;
        assert!(found.starts_with("step_results 3 "), "{found}");
        run(&world, &["delete from refusals", "delete from tasker.quarantine"]).await;
    }
    world.end().await;
}
