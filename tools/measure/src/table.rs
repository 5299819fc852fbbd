//! Every limit, and what each is a limit of. A limit falls when the figure does; it never rises.

/// One limit.
#[derive(Debug)]
pub struct Limit {
    /// What is counted.
    pub what: &'static str,
    /// The most that passes.
    pub most: usize,
}

/// Lines of code of the core: `decide`, settle with its SQL, and the tree.
pub const CORE_LINES: Limit = Limit { what: "lines of code of the core", most: 10_000 };
/// Lines of code of the longest file, tests included.
pub const FILE_LINES: Limit = Limit { what: "lines of code of the longest file", most: 600 };
/// Groups of files of a crate that import each other.
pub const CIRCLES: Limit = Limit { what: "circles of imports", most: 0 };
/// Groups of rooms of a crate, the files and folders at the top of its sources, that import each other.
pub const ROOM_CIRCLES: Limit = Limit { what: "circles of rooms", most: 0 };
/// What a worker's user compiles.
pub const WORKER_PACKAGES: Limit = Limit { what: "packages of a worker's user", most: 179 };
/// Functions of ours between the reader of results and the one that runs the transaction's statements.
pub const FRAMES: Limit = Limit { what: "frames between the reader of results and the transaction", most: 6 };
/// Files of the walk from a result to the next step's message.
pub const RESULT_FILES: Limit = Limit { what: "files of the walk of a result", most: 15 };
/// The heading of that walk in ARCHITECTURE.md.
pub const RESULT_WALK: &str = "A result becomes a message";
/// Whose packages are counted.
pub const WORKER: &str = "tasker-worker";

/// The crates that users run, whose lines are counted and whose sources are on the map.
pub const PRODUCT: [&str; 5] = ["tasker-shared", "tasker-orchestration", "tasker-worker", "tasker-api", "tasker-cli"];

/// The core: what decides, what records, and what turns the record into a trace.
pub const CORE: &[&str] = &[
    "tasker-shared/src/state_machine",
    "tasker-orchestration/src/lifecycle",
    "tasker-shared/src/trace/tree.rs",
    "tasker-shared/src/trace/ids.rs",
    "tasker-shared/src/trace/log.rs",
    "tasker-shared/src/trace/span.rs",
    "tasker-shared/src/trace/names.rs",
];
