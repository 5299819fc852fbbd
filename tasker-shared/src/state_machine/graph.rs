//! Template -> checked DAG.
