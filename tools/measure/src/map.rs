//! What ARCHITECTURE.md says about the code, read so that it can be compared with the code: the map and
//! the five walks.

use std::collections::BTreeSet;
use std::path::Path;

use crate::rooms::top;
use crate::table::PRODUCT;
use crate::{Error, read};

/// The document.
pub const DOCUMENT: &str = "ARCHITECTURE.md";
/// The heading above the walks.
const WALKS: &str = "## Five walks";
/// The heading above the map.
const MAP: &str = "## Code map";

/// One way through the code.
#[derive(Debug, PartialEq, Eq)]
pub struct Walk {
    /// Its heading.
    pub name: String,
    /// Each place that it comes by: a file, and what is in it.
    pub steps: Vec<(String, String)>,
}

impl Walk {
    /// The files that it comes by.
    pub fn files(&self) -> BTreeSet<&str> {
        self.steps.iter().map(|(file, _)| file.as_str()).collect()
    }
}

/// The walks of a document; none if it has no such section yet.
///
/// # Errors
/// If a line of a walk does not name a file and what is in it.
pub fn walks(document: &str) -> Result<Vec<Walk>, Error> {
    let mut walks: Vec<Walk> = Vec::new();
    for line in section(document, WALKS).into_iter().flatten() {
        if let Some(name) = line.strip_prefix("### ") {
            walks.push(Walk { name: name.trim().to_owned(), steps: Vec::new() });
        } else if line.split_once(". ").is_some_and(|(number, _)| number.parse::<u32>().is_ok()) {
            let quoted = quoted(line);
            let [file, what, ..] = &quoted[..] else {
                return Err(Error(format!("{DOCUMENT}: a step of a walk names a file and a function: {line}")));
            };
            let Some(walk) = walks.last_mut() else {
                return Err(Error(format!("{DOCUMENT}: a step before the first walk's heading: {line}")));
            };
            walk.steps.push(((*file).to_owned(), (*what).to_owned()));
        }
    }
    match walks.iter().find(|walk| walk.steps.is_empty()) {
        Some(walk) => Err(Error(format!("{DOCUMENT}: the walk {:?} has no steps", walk.name))),
        None => Ok(walks),
    }
}

/// What is wrong with the steps of a walk: files that do not exist, and files without what they are named for.
pub fn untrue(root: &Path, walk: &Walk) -> Vec<String> {
    let problem = |(file, what): &(String, String)| match read(root, file) {
        Err(error) => Some(format!("{}: {error}", walk.name)),
        Ok(text) => (!defines(file, &text, what)).then(|| format!("{}: {file} has no `{what}`", walk.name)),
    };
    walk.steps.iter().filter_map(problem).collect()
}

/// Whether a file defines something: in Rust as an item, elsewhere in any way.
fn defines(file: &str, text: &str, what: &str) -> bool {
    const KINDS: [&str; 8] = ["fn", "struct", "enum", "trait", "type", "const", "static", "mod"];
    let name = what.trim_end_matches("()").rsplit("::").next().unwrap_or(what);
    if Path::new(file).extension().is_none_or(|ending| ending != "rs") {
        return text.contains(name);
    }
    KINDS.iter().any(|kind| {
        let item = format!("{kind} {name}");
        text.match_indices(&item)
            .any(|(at, _)| !text[at + item.len()..].starts_with(|c: char| c.is_alphanumeric() || c == '_'))
    })
}

/// The paths that the map of the code names. In a cell a path without a crate is beside the one before it.
///
/// # Errors
/// If the document has no map.
pub fn mapped(document: &str, root: &Path) -> Result<Vec<String>, Error> {
    let lines = section(document, MAP).ok_or_else(|| Error(format!("{DOCUMENT} has no section {MAP}")))?;
    let mut paths = Vec::new();
    for line in lines.filter(|line| line.starts_with("| `")) {
        let cell = line.trim_start_matches("| ").split(" | ").next().unwrap_or_default();
        let mut beside = String::new();
        for quoted in quoted(cell) {
            for path in braces(quoted) {
                let first = path.split('/').next().unwrap_or_default();
                let is_whole = beside.is_empty() || (path.contains('/') && root.join(first).exists());
                let whole = if is_whole { path } else { format!("{beside}{path}") };
                let folder = whole.trim_end_matches('/').rsplit_once('/').map_or("", |(folder, _)| folder);
                beside = format!("{folder}/");
                paths.push(whole);
            }
        }
    }
    Ok(paths)
}

/// What is wrong with the map: paths that do not exist, and tops of the product's sources that it does not name.
///
/// # Errors
/// If the product is not where the table says.
pub fn unmapped(root: &Path, paths: &[String]) -> Result<Vec<String>, Error> {
    let mut wrong: Vec<String> = paths
        .iter()
        .filter(|path| !root.join(path).exists())
        .map(|path| format!("{DOCUMENT} names {path}, which does not exist"))
        .collect();
    for member in PRODUCT {
        let source = format!("{member}/src/");
        let entries = std::fs::read_dir(root.join(&source)).map_err(|error| Error(format!("{source}: {error}")))?;
        let names: Vec<String> =
            entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        let tops: BTreeSet<&str> =
            names.iter().map(|name| top(name)).filter(|name| !["lib", "main", "snapshots"].contains(name)).collect();
        let is_named = |name: &str| {
            paths.iter().any(|path| *path == source || path.strip_prefix(&source).is_some_and(|path| top(path) == name))
        };
        wrong.extend(
            tops.into_iter()
                .filter(|name| !is_named(name))
                .map(|name| format!("{DOCUMENT}: the map says nothing of {source}{name}")),
        );
    }
    Ok(wrong)
}

/// The lines of a section of the second level.
fn section<'a>(document: &'a str, heading: &str) -> Option<impl Iterator<Item = &'a str>> {
    let mut lines = document.lines();
    lines.by_ref().find(|line| line.trim_end() == heading)?;
    Some(lines.take_while(|line| !line.starts_with("## ")))
}

fn quoted(text: &str) -> Vec<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

/// `a/{b,c}.rs` as `a/b.rs` and `a/c.rs`.
fn braces(path: &str) -> Vec<String> {
    let Some((before, rest)) = path.split_once('{') else { return vec![path.to_owned()] };
    let (inner, after) = rest.split_once('}').unwrap_or((rest, ""));
    inner.split(',').map(|part| format!("{before}{}{after}", part.trim())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# House

## Code map

| place | owns |
|---|---|
| `tools/measure/src/{map,table}.rs`, `lines.rs` | what is `not/a/path.rs` |
| `tools/` | all |

## Five walks

A walk is a way through the code.

### A result becomes a message

1. `tools/measure/src/map.rs` `walks` reads this text
2. `tools/measure/src/map.rs` `Walk::files` counts
10. `tools/measure/src/table.rs` `PRODUCT` names the crates

### A map is read

1. `tools/measure/src/map.rs` `Walker` is not there
2. `tools/measure/src/nowhere.rs` `walks` neither

## Invariants

1. `no/step.rs` `of` a walk
";

    #[test]
    fn walks_are_read_and_compared_with_the_code() {
        let walks = walks(TEXT).expect("walks");
        let names: Vec<_> =
            walks.iter().map(|walk| (walk.name.as_str(), walk.steps.len(), walk.files().len())).collect();
        assert_eq!(names, [("A result becomes a message", 3, 2), ("A map is read", 2, 2)]);
        assert_eq!(untrue(crate::root(), &walks[0]), [""; 0]);
        let wrong = untrue(crate::root(), &walks[1]);
        assert_eq!(wrong.len(), 2, "{wrong:?}");
        assert_eq!(wrong[0], "A map is read: tools/measure/src/map.rs has no `Walker`");
    }

    #[test]
    fn a_step_without_a_function_is_an_error() {
        assert!(walks("## Five walks\n### One\n1. `a.rs` does it\n").is_err());
        assert!(walks("## Five walks\n### One\nNothing.\n").is_err());
        assert_eq!(walks("# No walks yet\n").expect("none"), []);
    }

    #[test]
    fn the_map_names_paths_in_short_forms() {
        let paths = mapped(TEXT, crate::root()).expect("a map");
        let expected =
            ["tools/measure/src/map.rs", "tools/measure/src/table.rs", "tools/measure/src/lines.rs", "tools/"];
        assert_eq!(paths, expected);
        let wrong = unmapped(crate::root(), &["nowhere/".to_owned()]).expect("the product is there");
        assert_eq!(wrong[0], "ARCHITECTURE.md names nowhere/, which does not exist");
        assert!(wrong.iter().any(|line| line.contains("tasker-shared/src/store")), "{wrong:?}");
    }
}
