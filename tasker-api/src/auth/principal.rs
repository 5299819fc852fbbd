//! What a credential may do: scopes by verb, within namespaces.

use std::collections::BTreeSet;
use std::str::FromStr;

use super::keys::ValidKey;
use crate::problem::{FORBIDDEN, Problem};

macro_rules! scopes {
    ($($(#[doc = $doc:literal])* $name:ident = $word:literal;)*) => {
        /// One thing that a key may do.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Scope { $($(#[doc = $doc])* $name),* }

        impl Scope {
            /// Every scope.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// As it is written.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$name => $word),* }
            }

            /// What it allows.
            pub fn about(self) -> &'static str {
                match self { $(Self::$name => concat!($($doc),*).trim_ascii()),* }
            }
        }
    };
}

scopes! {
    /// See tasks, steps, attempts, transitions, traces and live changes, without payloads
    TasksRead = "tasks:read";
    /// See inputs, outputs, errors and quarantined messages
    PayloadsRead = "payloads:read";
    /// Submit tasks
    TasksSubmit = "tasks:submit";
    /// Send signals to tasks
    TasksSignal = "tasks:signal";
    /// Cancel, suspend, resume, retry, rerun and settle tasks and steps
    TasksOperate = "tasks:operate";
    /// See templates
    TemplatesRead = "templates:read";
    /// Register templates
    TemplatesWrite = "templates:write";
    /// See schedules
    SchedulesRead = "schedules:read";
    /// Create, change, delete, pause and trigger schedules
    SchedulesWrite = "schedules:write";
    /// See queues, workers and orchestrators, and what is in quarantine
    QueuesRead = "queues:read";
    /// Pause and resume queues, requeue and discard quarantined messages
    QueuesOperate = "queues:operate";
    /// See namespaces, limits, retention and settings
    LimitsRead = "limits:read";
    /// Set and remove limits and retention
    LimitsWrite = "limits:write";
    /// See what operators did
    AuditRead = "audit:read";
    /// Read the metrics of this process
    MetricsRead = "metrics:read";
}

impl FromStr for Scope {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        Self::ALL.iter().copied().find(|scope| scope.as_str() == word).ok_or_else(|| {
            let all: Vec<&str> = Self::ALL.iter().map(|scope| scope.as_str()).collect();
            format!("must be one of {}", all.join(", "))
        })
    }
}

/// What a key may do if nothing narrower is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Looks, but sees no payloads.
    Viewer,
    /// Looks, submits and operates.
    Operator,
    /// Everything.
    Admin,
}

impl Role {
    /// Every role.
    pub const ALL: [Self; 3] = [Self::Viewer, Self::Operator, Self::Admin];

    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Operator => "operator",
            Self::Admin => "admin",
        }
    }

    /// What it may do.
    pub fn scopes(self) -> BTreeSet<Scope> {
        let may = |scope: &Scope| match scope {
            Scope::TasksRead
            | Scope::TemplatesRead
            | Scope::SchedulesRead
            | Scope::QueuesRead
            | Scope::LimitsRead
            | Scope::MetricsRead => true,
            Scope::PayloadsRead
            | Scope::TasksSubmit
            | Scope::TasksSignal
            | Scope::TasksOperate
            | Scope::SchedulesWrite
            | Scope::QueuesOperate
            | Scope::AuditRead => self != Self::Viewer,
            Scope::TemplatesWrite | Scope::LimitsWrite => self == Self::Admin,
        };
        Scope::ALL.iter().copied().filter(may).collect()
    }
}

impl FromStr for Role {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|role| role.as_str() == word).ok_or("must be viewer, operator or admin".into())
    }
}

/// Who asks. Handlers ask it before they look at anything: [`require`](Self::require).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Principal {
    /// The name of the key: what the audit calls the actor.
    pub name: String,
    /// The public part of the key.
    pub key_id: String,
    scopes: BTreeSet<Scope>,
    /// `None`: every namespace.
    namespaces: Option<Vec<String>>,
}

impl Principal {
    /// What this key may do. A scope that this build does not know allows nothing.
    pub(crate) fn of(key: ValidKey) -> Self {
        let scopes = match (&key.scopes, key.role.parse::<Role>()) {
            (Some(scopes), _) => scopes.iter().filter_map(|word| word.parse().ok()).collect(),
            (None, Ok(role)) => role.scopes(),
            (None, Err(_)) => BTreeSet::new(),
        };
        Self { name: key.name, key_id: key.key_id, scopes, namespaces: key.namespaces }
    }

    /// Whether it has this scope in some namespace.
    pub fn has(&self, scope: Scope) -> bool {
        self.scopes.contains(&scope)
    }

    /// Whether it may do this in this namespace.
    pub fn may(&self, scope: Scope, namespace: &str) -> bool {
        self.has(scope) && self.reaches(namespace)
    }

    /// Whether this namespace is one of its own.
    pub fn reaches(&self, namespace: &str) -> bool {
        self.namespaces.as_ref().is_none_or(|own| own.iter().any(|name| name == namespace))
    }

    /// Whether it may see the payloads of a namespace; `None` if it may not know of its tasks.
    pub fn payloads_of(&self, namespace: &str) -> Option<bool> {
        self.reaches(namespace).then(|| self.has(Scope::PayloadsRead))
    }

    /// Its namespaces, or `None` if it has all of them.
    pub fn namespaces(&self) -> Option<&[String]> {
        self.namespaces.as_deref()
    }

    /// Refuses what it may not do in a namespace that the request itself names.
    pub fn require(&self, scope: Scope, namespace: &str) -> Result<(), Problem> {
        self.require_scope(scope)?;
        if self.reaches(namespace) {
            return Ok(());
        }
        Err(FORBIDDEN.because(format!("namespace: this key may not use {namespace}")).field("namespace"))
    }

    /// Refuses what it may do nowhere.
    pub fn require_scope(&self, scope: Scope) -> Result<(), Problem> {
        if self.has(scope) {
            return Ok(());
        }
        Err(FORBIDDEN.because(format!("this key lacks the scope {}", scope.as_str())))
    }

    /// Refuses what concerns all namespaces together.
    pub fn require_everywhere(&self, scope: Scope) -> Result<(), Problem> {
        self.require_scope(scope)?;
        if self.namespaces.is_none() {
            return Ok(());
        }
        Err(FORBIDDEN.because("this concerns all namespaces, and this key has only some"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(role: &str, scopes: Option<&[&str]>, namespaces: Option<&[&str]>) -> Principal {
        let list = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect();
        Principal::of(ValidKey {
            key_id: "0".into(),
            name: "test".into(),
            secret_hash: vec![],
            role: role.into(),
            scopes: scopes.map(list),
            namespaces: namespaces.map(list),
        })
    }

    #[test]
    fn roles_grow() {
        let [viewer, operator, admin] = Role::ALL.map(Role::scopes);
        assert!(viewer.is_subset(&operator) && operator.is_subset(&admin));
        assert_eq!(admin.len(), Scope::ALL.len());
        assert!(!viewer.contains(&Scope::PayloadsRead), "payloads are a scope of their own");
    }

    #[test]
    fn scopes_take_the_place_of_the_role() {
        let only = key("admin", Some(&["tasks:read"]), None);
        assert!(only.has(Scope::TasksRead) && !only.has(Scope::TasksSubmit));
        assert!(!key("unheard of", None, None).has(Scope::TasksRead));
        assert!(!key("admin", Some(&["unheard:of"]), None).has(Scope::TasksRead));
    }

    #[test]
    fn a_namespace_of_others_is_out_of_reach() {
        let own = key("admin", None, Some(&["shop"]));
        assert!(own.may(Scope::TasksRead, "shop") && !own.may(Scope::TasksRead, "shops"));
        assert!(own.require_everywhere(Scope::TasksRead).is_err());
        assert!(key("admin", None, None).require_everywhere(Scope::TasksRead).is_ok());
    }
}
