//! A large value is kept once, however many steps read it, and every worker gets it whole.

use serde_json::{Value, json};
use tasker_tests::worker::Answer;

use crate::harness::{Setup, World};

#[tokio::test(flavor = "multi_thread")]
async fn a_large_output_is_stored_once_and_every_reader_gets_it() {
    let world = World::start(Setup { orchestrators: 2, ..Setup::by_hand() }).await;
    world
        .register(
            "wide",
            r#"
steps:
  - {name: load, handler: ok, input: {of: "${input.id}"}}
  - {name: whole, handler: ok, depends_on: [load], input: "${steps.load.output}"}
  - {name: part, handler: ok, depends_on: [load], input: {rows: ["${steps.load.output.rows[1]}", "${steps.load.output.id}"], blob: "${input.blob}"}}
  - {name: plain, handler: ok, depends_on: [load]}
  - {name: small, handler: ok, depends_on: [load], input: {id: "${steps.load.output.id}"}}
"#,
        )
        .await;
    // Not compressible to nothing: what is stored is measured below.
    let noise = |seed: u64| -> String {
        let mut state = seed;
        std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            char::from(b'a' + u8::try_from((state >> 33) % 26).unwrap_or(0))
        })
        .take(200_000)
        .collect()
    };
    let (blob, rows) = (noise(1), json!([noise(2), noise(3)]));
    let input = json!({"id": "in", "blob": blob});
    let task = world.submit_with(json!({"template": "wide", "input": input})).await.expect("submitted");
    let load = world.claim().await;
    assert_eq!(load.input, json!({"of": "in"}));
    let output = json!({"id": "out", "rows": rows});
    assert_eq!(world.report(&load, &Answer::Success(output.clone())).await, (true, false));
    let mut claims = Vec::new();
    for (name, expected) in [
        ("whole", output.clone()),
        ("part", json!({"rows": [rows[1], "out"], "blob": blob})),
        ("plain", json!({"input": input, "steps": {"load": output}})),
        ("small", json!({"id": "out"})),
    ] {
        let claim = world.claim_named(&mut claims, name).await;
        assert!(claim.input == expected, "{name} got something else");
        world.succeed(&claim).await;
    }
    assert_eq!(world.finish(&[task]).await, ["complete"]);
    let copied = world.number("select sum(octet_length(input::text))::bigint from tasker.steps").await;
    assert!(copied < 2000, "{copied} bytes of inputs are stored");
    let kept = world.number("select sum(octet_length(output::text))::bigint from tasker.attempts").await;
    assert!((400_000..402_000).contains(&kept), "{kept} bytes of outputs are stored");
    world.queues_drained().await;
    world.assert_complete().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_input_that_would_nest_too_deep_fails_its_step_alone_and_says_why() {
    let world = World::start(Setup::default()).await;
    let around = format!("{}'${{input}}'{}", "[".repeat(40), "]".repeat(40));
    let steps = format!("[{{name: a, handler: ok, input: {around}}}, {{name: b, handler: ok}}]");
    world.register("deep", &format!("on_failure: block\nsteps: {steps}")).await;
    world.register_steps("one", "a: ok").await;
    let nested = (0..63).fold(json!(1), |inner: Value, _| json!([inner]));
    let deep = world.submit_with(json!({"template": "deep", "input": {"x": nested}})).await.expect("submitted");
    let other = world.submit("one").await;
    assert_eq!(world.finish(&[deep, other]).await, ["blocked_by_failures", "complete"]);
    assert_eq!(world.steps(deep).await, ["a: error", "b: complete"]);
    let why = world.words("select detail->>'reason' from tasker.transitions where event = 'Fail'").await;
    assert_eq!(why.len(), 1);
    assert!(why[0].contains("would nest deeper than 96 levels"), "{why:?}");
    world.assert_complete().await;
    world.end().await;
}
