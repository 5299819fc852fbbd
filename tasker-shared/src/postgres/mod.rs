//! The managed local PostgreSQL.
