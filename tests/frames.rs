//! How far it is from the reader of results to the transaction: the functions of ours in between, counted
//! from backtraces that are captured while a real result is settled.

use std::backtrace::Backtrace;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use tasker_measure::source::Source;
use tasker_measure::table::{FRAMES, RESULT_WALK};
use tasker_measure::{map, read, root};
use tracing::span;

use crate::harness::{Setup, World};

/// The loop that reads results.
const READER: (&str, &str) = ("tasker-orchestration/src/runtime.rs", "read_results");
/// The file that alone begins transactions.
const TRANSACTIONS: &str = "tasker-shared/src/store/tx.rs";

/// Keeps where each statement was run from.
#[derive(Debug, Default, Clone)]
struct Statements(Arc<Mutex<Vec<Backtrace>>>);

impl tracing::Subscriber for Statements {
    fn enabled(&self, meta: &tracing::Metadata<'_>) -> bool {
        meta.target() == "sqlx::query"
    }

    fn event(&self, _: &tracing::Event<'_>) {
        self.0.lock().expect("not poisoned").push(Backtrace::force_capture());
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

/// A function of ours: its file and its name. What is inside of it counts as the function itself.
type Frame = (String, String);

/// The frames of ours in a backtrace, the outermost first. A backtrace does not name the function of an
/// async block, so the names are taken from the sources, by the lines.
fn ours(backtrace: &str) -> Vec<Frame> {
    let prefix = format!("{}/", root().display());
    let frame = |line: &str| {
        let place = line.trim().strip_prefix("at ")?.trim_start_matches(&prefix);
        let mut parts = place.split(':');
        let (file, line) = (parts.next()?, parts.next()?.parse().ok()?);
        if !file.starts_with("tasker-") {
            return None;
        }
        let source = Source::of(&read(root(), file).expect("a source of ours"));
        let function = source.function_at(line).unwrap_or_else(|| panic!("no function at {place}"));
        Some((file.to_owned(), function))
    };
    let mut frames: Vec<Frame> = backtrace.lines().filter_map(frame).collect();
    frames.reverse();
    frames
}

/// The distinct functions from the reader to the one that begins the transaction, and every file of ours on
/// the way to the statement; none if it is no statement of a settle's transaction.
fn way(backtrace: &str) -> Option<(Vec<Frame>, BTreeSet<String>)> {
    let frames = ours(backtrace);
    let reader = frames.iter().position(|(file, name)| (file.as_str(), name.as_str()) == READER)?;
    let frames = &frames[reader..];
    let begun = frames.iter().rposition(|(file, _)| file == TRANSACTIONS)?;
    let mut functions: Vec<Frame> = Vec::new();
    for frame in &frames[..=begun] {
        if !functions.contains(frame) {
            functions.push(frame.clone());
        }
    }
    Some((functions, frames.iter().map(|(file, _)| file.clone()).collect()))
}

// On one thread, so that everything that runs sees the subscriber.
#[tokio::test]
async fn few_frames_are_between_the_reader_of_results_and_its_transaction() {
    let world = World::start(Setup::by_hand()).await;
    world.register_steps("two", "a: ok\nb: ok <- a").await;
    world.submit("two").await;
    let a = world.claim().await;
    let statements = Statements::default();
    let captured = {
        let _guard = tracing::subscriber::set_default(statements.clone());
        world.succeed(&a).await;
        // Its message is sent when the result has been settled.
        world.claim().await;
        std::mem::take(&mut *statements.0.lock().expect("not poisoned"))
    };
    let ways: Vec<_> = captured.iter().filter_map(|backtrace| way(&backtrace.to_string())).collect();
    assert!(ways.len() > 3, "the statements of a settle were seen: {} of {}", ways.len(), captured.len());
    let (longest, _) = ways.iter().max_by_key(|(functions, _)| functions.len()).expect("there is one");
    let shown: Vec<String> = longest.iter().map(|(file, function)| format!("{file} {function}")).collect();
    // The reader is shown and not counted.
    let between = shown.len() - 1;
    println!("{}: {between}, at most {}\n{}", FRAMES.what, FRAMES.most, shown.join("\n"));
    assert!(between <= FRAMES.most, "\n{}", shown.join("\n"));

    let seen: BTreeSet<&String> = ways.iter().flat_map(|(_, files)| files).collect();
    let walks = map::walks(&read(root(), map::DOCUMENT).expect("the document")).expect("walks");
    println!("files: {seen:#?}");
    if !walks.is_empty() {
        let walk = walks.iter().find(|walk| walk.name == RESULT_WALK).expect("the walk of a result");
        let missing: Vec<_> = seen.into_iter().filter(|file| !walk.files().contains(file.as_str())).collect();
        assert!(missing.is_empty(), "a result comes by files that its walk does not name: {missing:?}");
    }
}
