//! The cluster against real server binaries.

#![allow(
    clippy::unwrap_used,
    reason = "a failed step of a test is a failed test, in helpers too"
)]

mod cluster;
mod testing;
