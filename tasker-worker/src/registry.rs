//! Handlers by name.

use std::collections::HashMap;
use std::sync::Arc;

use crate::handler::Handler;

/// The handlers that a worker offers.
#[derive(Default)]
pub(crate) struct Registry {
    handlers: HashMap<String, Arc<dyn Handler>>,
    /// The first name that was given twice.
    pub(crate) duplicate: Option<String>,
}

impl Registry {
    pub(crate) fn insert(&mut self, name: String, handler: impl Handler + 'static) {
        if self.handlers.contains_key(&name) {
            self.duplicate.get_or_insert(name);
            return;
        }
        self.handlers.insert(name, Arc::new(handler));
    }

    pub(crate) fn get(&self, name: &str) -> Option<&dyn Handler> {
        self.handlers.get(name).map(Arc::as_ref)
    }

    /// Sorted, so that the same worker always offers the same.
    pub(crate) fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = self.handlers.keys().cloned().collect();
        names.sort_unstable();
        names
    }
}
