//! ARCHITECTURE.md is true: what its map and its walks name is there.

use tasker_measure::{map, read, root};

#[test]
fn the_map_of_the_code_names_what_is_there_and_all_of_it() {
    let document = read(root(), map::DOCUMENT).expect("the document");
    let paths = map::mapped(&document, root()).expect("the map");
    assert!(paths.len() > 20, "the map is gone: {paths:?}");
    let wrong = map::unmapped(root(), &paths).expect("the product is there");
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn the_walks_name_what_is_there() {
    let walks = map::walks(&read(root(), map::DOCUMENT).expect("the document")).expect("walks");
    let wrong: Vec<String> = walks.iter().flat_map(|walk| map::untrue(root(), walk)).collect();
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}
