//! Every example of a feature is a good template, and runs with the built-in handlers.

use std::path::Path;

use tasker_shared::template;

#[test]
fn every_feature_example_lints_clean() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/features");
    let mut seen = 0;
    for entry in std::fs::read_dir(folder).expect("the folder") {
        let path = entry.expect("an entry").path();
        let text = std::fs::read_to_string(&path).expect("a readable file");
        let checked = template::parse(&path.display().to_string(), &text)
            .unwrap_or_else(|problems| panic!("{}: {problems:#?}", path.display()));
        for step in checked.template.steps.iter().filter(|step| !step.handler.is_empty()) {
            assert!(
                ["noop", "echo", "sleep", "fail"].contains(&&*step.handler),
                "{}: {} is no built-in handler",
                path.display(),
                step.handler
            );
        }
        seen += 1;
    }
    assert!(seen > 0);
}
