//! Migrations: numbered SQL files, run under an advisory lock.
