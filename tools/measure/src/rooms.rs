//! Lines of code per room, of the core, and of the longest file.

use std::collections::BTreeMap;
use std::path::Path;

use crate::lines::{self, Counted};
use crate::table::{CORE, PRODUCT};
use crate::{Error, files};

/// What the product's rooms are made of.
const CODE: [&str; 2] = ["rs", "sql"];

/// Lines of one crate and of what lies at the top of its sources.
#[derive(Debug)]
pub struct Room {
    /// The crate.
    pub name: &'static str,
    /// All of it.
    pub lines: usize,
    /// By folder or file at the top; `x.rs` and `x/` are one.
    pub parts: BTreeMap<String, usize>,
}

/// Measures every crate of the product.
///
/// # Errors
/// If one is not where the table says.
pub fn rooms(root: &Path) -> Result<Vec<Room>, Error> {
    let measure = |name: &'static str| {
        let mut measured = Room { name, lines: 0, parts: BTreeMap::new() };
        let source = format!("{name}/src");
        for path in files(root, &source, &CODE)? {
            let lines = lines::of(root, &path, Counted::Product)?;
            measured.lines += lines;
            *measured.parts.entry(top(&path[source.len() + 1..]).to_owned()).or_default() += lines;
        }
        Ok(measured)
    };
    PRODUCT.into_iter().map(measure).collect()
}

/// The folder or module at the top of a crate's sources in which a file lies.
pub(crate) fn top(path: &str) -> &str {
    path.split('/').next().unwrap_or(path).trim_end_matches(".rs")
}

/// Lines of each path of the core; what a file's module has below it belongs to it.
///
/// # Errors
/// If one of them does not exist.
pub fn core(root: &Path) -> Result<Vec<(&'static str, usize)>, Error> {
    let measure = |path: &'static str| {
        let mut inside = files(root, path, &CODE)?;
        let below = path.trim_end_matches(".rs");
        if below != path && root.join(below).is_dir() {
            inside.extend(files(root, below, &CODE)?);
        }
        let lines = inside.iter().map(|file| lines::of(root, file, Counted::Product)).sum::<Result<_, _>>()?;
        Ok((path, lines))
    };
    CORE.iter().copied().map(measure).collect()
}

/// Every source that we change, tests included, with its lines; the longest first. Migrations are frozen.
///
/// # Errors
/// If one cannot be read.
pub fn longest(root: &Path) -> Result<Vec<(usize, String)>, Error> {
    let mut found = Vec::new();
    for path in files(root, ".", &["rs", "sql", "js", "css", "sh"])? {
        let path = path.trim_start_matches("./").to_owned();
        if !path.starts_with("migrations/") {
            found.push((lines::of(root, &path, Counted::All)?, path));
        }
    }
    found.sort_by(|a, b| b.cmp(a));
    Ok(found)
}
