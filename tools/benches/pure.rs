//! `cargo bench -p tasker-benches`: what the pure parts cost, per task and per span.

use divan::counter::ItemsCount;
use divan::{Bencher, black_box};
use tasker_benches::{BEGAN, chain, first_of_five_reported, log, task};
use tasker_shared::state_machine::plan::Room;
use tasker_shared::state_machine::{Event, Snapshot, TaskState, decide};
use tasker_shared::trace::otlp::{Encoder, ServiceNames};
use tasker_shared::trace::tree;
use uuid::Uuid;

/// The first step's result, as [`first_of_five_reported`] has it.
const REPORTED: Event = Event::Result { step: Uuid::from_u128(10), attempt: 1 };

fn main() {
    divan::main();
}

/// One result of a chain of five: the step is complete, the next one goes out.
#[divan::bench]
fn decide_a_result(bencher: Bencher<'_, '_>) {
    let definition = chain(5);
    bencher
        .with_inputs(|| first_of_five_reported(&definition))
        .bench_values(|snapshot| decide(&snapshot, &[&REPORTED], &mut Room::unlimited(), BEGAN));
}

/// The start of a task, per step of its template.
#[divan::bench(args = [5, 1_000, 10_000])]
fn decide_a_start(bencher: Bencher<'_, '_>, steps: u32) {
    let definition = chain(steps);
    bencher
        .counter(ItemsCount::new(steps))
        .with_inputs(|| {
            let new_step_uuids = (0..u128::from(steps)).map(|step| Uuid::from_u128(100 + step)).collect();
            Snapshot { new_step_uuids, ..Snapshot::of_row(task(TaskState::Pending, 0), definition.clone()) }
        })
        .bench_values(|snapshot| decide(&snapshot, &[&Event::Start], &mut Room::unlimited(), BEGAN));
}

/// From the log to spans, per span.
#[divan::bench(args = [5, 1_000])]
fn draw_the_tree(bencher: Bencher<'_, '_>, steps: u32) {
    let log = log(steps);
    bencher.counter(ItemsCount::new(tree::spans(&log).spans.len())).bench(|| tree::spans(black_box(&log)));
}

/// From spans to the bytes of an OTLP request, per span.
#[divan::bench(args = [5, 1_000])]
fn write_otlp(bencher: Bencher<'_, '_>, steps: u32) {
    let spans = tree::spans(&log(steps));
    let mut encoder = Encoder::new(&ServiceNames::default());
    bencher.counter(ItemsCount::new(spans.spans.len())).bench_local(|| {
        encoder.push(black_box(&spans));
        encoder.finish()
    });
}
