//! The links of the documents: each resolves, each anchor is a heading, and each document stands in the index.

use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the repository").to_owned()
}

/// The Markdown files of the repository, but for what is built or hidden.
fn documents() -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![root()];
    while let Some(folder) = open.pop() {
        for entry in std::fs::read_dir(&folder).expect("a folder can be read") {
            let path = entry.expect("an entry").path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if path.is_dir() {
                if !name.starts_with('.') && !["target", "node_modules"].contains(&name.as_str()) {
                    open.push(path);
                }
            } else if path.extension().is_some_and(|ending| ending == "md") {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

/// Its lines outside blocks of code.
fn prose(text: &str) -> impl Iterator<Item = &str> {
    let mut code = false;
    text.lines().filter(move |line| {
        let fence = line.trim_start().starts_with("```");
        code ^= fence;
        !code && !fence
    })
}

/// What follows each `](` up to its `)`, outside of code.
fn links(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for line in prose(text) {
        let bare: String = line.split('`').step_by(2).collect::<Vec<_>>().join("`");
        found.extend(bare.split("](").skip(1).filter_map(|rest| rest.split(')').next()).map(str::to_owned));
    }
    found
}

/// The anchors of its headings, by the rule that GitHub and mdBook share.
fn anchors(text: &str) -> BTreeSet<String> {
    let headings = prose(text).filter(|line| line.starts_with('#')).map(|line| line.trim_start_matches('#').trim());
    let letter = |c: char| match c {
        ' ' => Some('-'),
        c if c.is_alphanumeric() || c == '-' || c == '_' => Some(c),
        _ => None,
    };
    headings.map(|heading| heading.to_lowercase().chars().filter_map(letter).collect()).collect()
}

/// The path without `.` and `..`.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => assert!(plain.pop(), "{} leaves the repository", path.display()),
            part => plain.push(part),
        }
    }
    plain
}

/// The files that a document links to, each with the anchor.
fn targets(document: &Path) -> Vec<(PathBuf, String)> {
    let text = std::fs::read_to_string(document).expect("a document can be read");
    let local = links(&text).into_iter().filter(|link| !link.contains("://") && !link.starts_with("mailto:"));
    local
        .map(|link| {
            let (file, anchor) = link.split_once('#').unwrap_or((&link, ""));
            let path = if file.is_empty() { document.to_owned() } else { document.with_file_name("").join(file) };
            (plain(&path), anchor.to_owned())
        })
        .collect()
}

#[test]
fn every_link_of_a_document_leads_somewhere() {
    let mut broken = Vec::new();
    let mut seen = 0;
    for document in documents() {
        for (path, anchor) in targets(&document) {
            seen += 1;
            let name = format!("{} -> {}#{anchor}", document.display(), path.display());
            if !path.exists() {
                broken.push(name);
            } else if !anchor.is_empty() {
                let text = std::fs::read_to_string(&path).expect("an anchor is in a text");
                if !anchors(&text).contains(&anchor) {
                    broken.push(name);
                }
            }
        }
    }
    assert!(seen > 100, "only {seen} links were found");
    assert!(broken.is_empty(), "these links lead nowhere:\n{}", broken.join("\n"));
}

#[test]
fn every_document_stands_in_the_index() {
    let index = root().join("docs/SUMMARY.md");
    let listed: BTreeSet<PathBuf> = targets(&index).into_iter().map(|(path, _)| path).collect();
    let docs = root().join("docs");
    let missing: Vec<PathBuf> = documents()
        .into_iter()
        .filter(|path| path.starts_with(&docs) && *path != index && !listed.contains(path))
        .collect();
    assert!(listed.len() > 20, "the index was read");
    assert!(missing.is_empty(), "these are not in docs/SUMMARY.md: {missing:?}");
}

#[test]
fn links_and_anchors_are_read_as_a_reader_sees_them() {
    let text = "# What the `server` must be: all\n[a](b.md#c) `[x](y)` [d](e)\n```sh\n# no heading\n[f](g)\n```\n";
    assert_eq!(links(text), ["b.md#c", "e"]);
    assert_eq!(anchors(text), BTreeSet::from(["what-the-server-must-be-all".to_owned()]));
}
