//! The form of the code in figures, and the limits that they keep.
//!
//! It reads sources as text and runs `cargo tree`. It never builds or runs the product.

pub mod circles;
pub mod lines;
pub mod map;
pub mod packages;
pub mod report;
pub mod rooms;
pub mod source;
pub mod table;

use std::path::Path;

/// A figure could not be taken.
#[derive(Debug)]
pub struct Error(pub String);

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

/// The folder of the workspace.
///
/// # Panics
/// If this crate is not in a folder of it.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("the workspace has this crate in tools/measure")
}

/// The text of a file of the workspace.
///
/// # Errors
/// If it is not there.
pub fn read(root: &Path, path: &str) -> Result<String, Error> {
    std::fs::read_to_string(root.join(path)).map_err(|error| Error(format!("{path}: {error}")))
}

/// The files at or below a path of the workspace that have one of these endings, in order.
///
/// # Errors
/// If the path does not exist: a figure of something that was renamed would be a good one.
pub fn files(root: &Path, path: &str, endings: &[&str]) -> Result<Vec<String>, Error> {
    let start = root.join(path);
    if !start.exists() {
        return Err(Error(format!("{path} does not exist; change the table in tools/measure/src/table.rs")));
    }
    let (mut open, mut found) = (vec![start], Vec::new());
    while let Some(at) = open.pop() {
        // A link is another path to what is counted where it is.
        if at.is_symlink() {
            continue;
        }
        if at.is_dir() {
            if at.file_name().is_some_and(|name| name == "target" || name == ".git") {
                continue;
            }
            let entries = std::fs::read_dir(&at).map_err(|error| Error(format!("{}: {error}", at.display())))?;
            open.extend(entries.flatten().map(|entry| entry.path()));
        } else if endings.iter().any(|ending| at.extension().is_some_and(|found| found == *ending)) {
            found.push(relative(root, &at));
        }
    }
    found.sort();
    Ok(found)
}

fn relative(root: &Path, path: &Path) -> String {
    path.strip_prefix(root).unwrap_or(path).to_string_lossy().into_owned()
}
