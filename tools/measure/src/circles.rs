//! Files of one crate that import each other in a circle.
//!
//! A file imports the files that define what it names: in `use` declarations, and in paths that begin
//! with `crate`, `self`, `super`, a child module or a module that it has imported. Names are followed
//! through re-exports to where they are defined. A module may use what lies below it, so that is no
//! import here; a child that uses what its parent defines imports it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::lines::is_test;
use crate::rooms::top;
use crate::source::Source;
use crate::{Error, files, read};

/// Which names a file takes from which.
pub type Imports = BTreeMap<(String, String), BTreeSet<String>>;

/// The imports of a crate, from its sources without tests.
///
/// # Errors
/// If the crate's sources cannot be read.
pub fn imports(root: &Path, member: &str) -> Result<Imports, Error> {
    let source = format!("{member}/src");
    let mut modules = Vec::new();
    for path in files(root, &source, &["rs"])? {
        if !is_test(&path) {
            modules.push((path.clone(), read(root, &path)?));
        }
    }
    Ok(between(&source, &modules))
}

/// Which rooms of a crate take which names from which: a room is a file or a folder at the top of its
/// sources, a file of the same name included.
pub fn between_rooms(member: &str, imports: &Imports) -> Imports {
    let room = |file: &str| {
        let source = format!("{member}/src/");
        format!("{source}{}", top(file.trim_start_matches(&source)))
    };
    let mut rooms = Imports::new();
    for ((from, to), names) in imports {
        let (from, to) = (room(from), room(to));
        if from != to {
            rooms.entry((from, to)).or_default().extend(names.iter().cloned());
        }
    }
    rooms
}

/// The groups of files that import each other, each with the imports inside it.
pub fn circles(imports: &Imports) -> Vec<Imports> {
    let mut next: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (from, to) in imports.keys() {
        next.entry(from).or_default().push(to);
    }
    let reach: BTreeMap<&str, BTreeSet<&str>> = next.keys().map(|from| (*from, reached(from, &next))).collect();
    let is_tied = |a: &str, b: &str| reach.get(a).is_some_and(|to| to.contains(b));
    let (mut groups, mut seen) = (Vec::new(), BTreeSet::new());
    for file in next.keys().filter(|file| is_tied(file, file)) {
        if seen.contains(file) {
            continue;
        }
        let group: BTreeSet<&str> =
            next.keys().copied().filter(|other| is_tied(file, other) && is_tied(other, file)).collect();
        let inside = |(from, to): &(String, String)| group.contains(from.as_str()) && group.contains(to.as_str());
        groups.push(imports.iter().filter(|(pair, _)| inside(pair)).map(|(p, n)| (p.clone(), n.clone())).collect());
        seen.extend(group);
    }
    groups
}

fn reached<'a>(from: &str, next: &BTreeMap<&'a str, Vec<&'a str>>) -> BTreeSet<&'a str> {
    let (mut seen, mut open) = (BTreeSet::new(), vec![from]);
    while let Some(at) = open.pop() {
        for to in next.get(at).into_iter().flatten() {
            if seen.insert(*to) {
                open.push(to);
            }
        }
    }
    seen
}

type Segments = Vec<String>;

/// One file: what it calls the things that it imports, and every path that it names.
#[derive(Debug, Default)]
struct Module {
    file: String,
    /// The name here, and the path as written.
    names: BTreeMap<String, Segments>,
    /// Modules of which everything is imported.
    globs: Vec<Segments>,
    /// Every path in it, but those of `use` declarations.
    paths: BTreeSet<Segments>,
    /// What it defines.
    defines: BTreeSet<String>,
}

fn between(source: &str, texts: &[(String, String)]) -> Imports {
    let modules: BTreeMap<Segments, Module> =
        texts.iter().map(|(path, text)| (module_of(source, path), parse(path, text))).collect();
    let mut imports = Imports::new();
    for (at, module) in &modules {
        let uses_below = |name: &str| module.paths.iter().any(|path| path.len() > 1 && path[0] == name);
        let mut wanted: Vec<Segments> = module.paths.iter().cloned().collect();
        // An imported module that is only gone through is not what is imported.
        let named = module.names.iter().filter(|(name, path)| {
            !(uses_below(name) && absolute(at, path).is_some_and(|path| modules.contains_key(&path)))
        });
        wanted.extend(named.map(|(_, path)| path.clone()));
        wanted.extend(module.globs.iter().cloned());
        for path in wanted {
            let Some((found, name)) = find(&modules, at, &path, 8) else { continue };
            let is_below = found.len() > at.len() && found.starts_with(at);
            if found != *at && !is_below {
                let pair = (module.file.clone(), modules[&found].file.clone());
                imports.entry(pair).or_default().insert(name);
            }
        }
    }
    imports
}

/// The module that defines what a path names, seen from a module, and its name there.
fn find(
    modules: &BTreeMap<Segments, Module>,
    at: &Segments,
    path: &[String],
    depth: usize,
) -> Option<(Segments, String)> {
    let depth = depth.checked_sub(1)?;
    let module = modules.get(at)?;
    let (first, rest) = path.split_first()?;
    let start = match absolute(at, std::slice::from_ref(first)) {
        Some(start) => start,
        None if modules.contains_key(&join(at, first)) => join(at, first),
        None => {
            if let Some(named) = module.names.get(first) {
                let whole: Segments = named.iter().chain(rest).cloned().collect();
                // A name that is its own path would be looked up for ever.
                return (named.first() != Some(first)).then(|| find(modules, at, &whole, depth))?;
            }
            if module.defines.contains(first) {
                return Some((at.clone(), first.clone()));
            }
            return through_globs(modules, at, first, depth);
        }
    };
    let mut start = start;
    let mut rest = rest;
    while let Some((next, after)) = rest.split_first() {
        match next.as_str() {
            "super" => _ = start.pop(),
            _ if modules.contains_key(&join(&start, next)) => start.push(next.clone()),
            _ => {
                let found = find_in(modules, &start, next, after, depth);
                return found.or_else(|| modules.contains_key(&start).then(|| (start, next.clone())));
            }
        }
        rest = after;
    }
    let name = start.last().cloned().unwrap_or_else(|| "crate".into());
    modules.contains_key(&start).then_some((start, name))
}

/// What a module means by a name.
fn find_in(
    modules: &BTreeMap<Segments, Module>,
    at: &Segments,
    name: &str,
    after: &[String],
    depth: usize,
) -> Option<(Segments, String)> {
    let module = modules.get(at)?;
    if module.defines.contains(name) {
        return Some((at.clone(), name.to_owned()));
    }
    if let Some(path) = module.names.get(name) {
        let whole: Segments = path.iter().chain(after).cloned().collect();
        return find(modules, at, &whole, depth);
    }
    through_globs(modules, at, name, depth)
}

fn through_globs(
    modules: &BTreeMap<Segments, Module>,
    at: &Segments,
    name: &str,
    depth: usize,
) -> Option<(Segments, String)> {
    let depth = depth.checked_sub(1)?;
    modules.get(at)?.globs.iter().find_map(|glob| {
        let (target, _) = find(modules, at, glob, depth)?;
        if target == *at { None } else { find_in(modules, &target, name, &[], depth) }
    })
}

fn join(at: &Segments, name: &str) -> Segments {
    at.iter().cloned().chain([name.to_owned()]).collect()
}

/// A path that begins with `crate`, `self` or `super`, from the crate's root.
fn absolute(at: &Segments, path: &[String]) -> Option<Segments> {
    let (first, rest) = path.split_first()?;
    let mut start = match first.as_str() {
        "crate" => Vec::new(),
        "self" => at.clone(),
        "super" => at[..at.len().saturating_sub(1)].to_vec(),
        _ => return None,
    };
    for segment in rest {
        if segment == "super" {
            start.pop();
        } else {
            start.push(segment.clone());
        }
    }
    Some(start)
}

fn module_of(source: &str, path: &str) -> Segments {
    let inner = path[source.len() + 1..].trim_end_matches(".rs");
    let mut module: Segments = inner.split('/').map(str::to_owned).collect();
    if module.last().is_some_and(|last| last == "mod") || ["lib", "main"].contains(&inner) {
        module.pop();
    }
    module
}

fn parse(path: &str, text: &str) -> Module {
    const KINDS: [&str; 10] = ["fn", "struct", "enum", "trait", "type", "const", "static", "union", "macro", "mod"];
    let tokens = Source::of(text).without_tests().tokens();
    let mut module = Module { file: path.to_owned(), ..Module::default() };
    let mut at = 0;
    while at < tokens.len() {
        let token = tokens[at].as_str();
        let before = at.checked_sub(1).map_or("", |before| tokens[before].as_str());
        if token == "use" && ["", ";", "}", "{", "]", ")", "pub"].contains(&before) {
            at = use_tree(&tokens, at + 1, &Vec::new(), &mut module);
            continue;
        }
        if KINDS.contains(&token)
            && before != "::"
            && tokens.get(at + 2).is_some_and(|next| token != "mod" || next == "{")
        {
            module.defines.insert(tokens[at + 1].clone());
        }
        if is_word(token) && before != "::" && before != "." && tokens.get(at + 1).is_some_and(|next| next == "::") {
            let mut path = vec![token.to_owned()];
            while tokens.get(at + 1).is_some_and(|next| next == "::") && tokens.get(at + 2).is_some_and(|t| is_word(t))
            {
                path.push(tokens[at + 2].clone());
                at += 2;
            }
            module.paths.insert(path);
        }
        at += 1;
    }
    module
}

fn is_word(token: &str) -> bool {
    token.starts_with(|c: char| c.is_alphabetic() || c == '_')
}

/// Reads one tree of a `use` declaration; answers the place behind it.
fn use_tree(tokens: &[String], mut at: usize, prefix: &Segments, module: &mut Module) -> usize {
    let mut path = prefix.clone();
    while let Some(token) = tokens.get(at) {
        match token.as_str() {
            "::" => at += 1,
            "*" => {
                module.globs.push(path);
                return at + 1;
            }
            "{" => {
                at += 1;
                while tokens.get(at).is_some_and(|token| token != "}") {
                    at = if tokens[at] == "," { at + 1 } else { use_tree(tokens, at, &path, module) };
                }
                return at + 1;
            }
            "as" => {
                module.names.insert(tokens.get(at + 1).cloned().unwrap_or_default(), path);
                return at + 2;
            }
            "self" if !path.is_empty() => at += 1,
            word if is_word(word) => {
                path.push(word.to_owned());
                at += 1;
            }
            _ => break,
        }
    }
    if let Some(name) = path.last() {
        module.names.insert(name.clone(), path);
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(files: &[(&str, &str)]) -> Vec<String> {
        let files: Vec<_> = files.iter().map(|(path, text)| (format!("c/src/{path}"), (*text).to_owned())).collect();
        let name = |path: &str| path.trim_start_matches("c/src/").trim_end_matches(".rs").to_owned();
        between("c/src", &files)
            .iter()
            .map(|((from, to), names)| {
                format!("{} -> {}: {}", name(from), name(to), names.iter().cloned().collect::<Vec<_>>().join(" "))
            })
            .collect()
    }

    #[test]
    fn a_file_imports_what_defines_the_names_that_it_uses() {
        let files = [
            ("lib.rs", "pub mod a; mod b; pub use b::Thing;"),
            ("a.rs", "use crate::Thing; use crate::b::{self, other as o}; fn f() { b::more(); o() }"),
            ("b.rs", "pub struct Thing; pub fn other() {} pub fn more() {}"),
        ];
        assert_eq!(pairs(&files), ["a -> b: Thing more other"]);
    }

    #[test]
    fn a_parent_may_use_its_children_and_a_child_imports_its_parent() {
        let files = [
            ("lib.rs", "mod a;"),
            ("a/mod.rs", "mod x; use self::x::X; struct Shared; fn f() { x::g() }"),
            ("a/x.rs", "use super::Shared; pub struct X; pub fn g() {}"),
        ];
        assert_eq!(pairs(&files), ["a/x -> a/mod: Shared"]);
    }

    #[test]
    fn paths_in_code_are_imports_and_tests_are_none() {
        let files = [
            ("lib.rs", "mod a; mod b; mod c;"),
            (
                "a.rs",
                "fn f() { super::b::g(); let s = \"crate::c::h\"; }\n#[cfg(test)]\nmod tests { use crate::c::h; }",
            ),
            ("b.rs", "pub fn g() {}"),
            ("c.rs", "pub fn h() {}"),
        ];
        assert_eq!(pairs(&files), ["a -> b: g"]);
    }

    #[test]
    fn a_module_that_is_gone_through_is_not_imported() {
        let files = [
            ("lib.rs", "mod a; mod s;"),
            ("a.rs", "use crate::s; fn f() { s::t::run() }"),
            ("s/mod.rs", "pub mod t;"),
            ("s/t.rs", "pub fn run() {}"),
        ];
        assert_eq!(pairs(&files), ["a -> s/t: run"]);
    }

    #[test]
    fn circles_are_groups_of_files_that_reach_each_other() {
        let pair = |from: &str, to: &str| ((from.to_owned(), to.to_owned()), BTreeSet::from(["x".to_owned()]));
        let imports: Imports =
            [pair("a", "b"), pair("b", "c"), pair("c", "a"), pair("c", "d"), pair("e", "f"), pair("f", "e")].into();
        let sizes: Vec<usize> = circles(&imports).iter().map(BTreeMap::len).collect();
        assert_eq!(sizes, [3, 2]);
    }
}
