//! Black-box tests: they start the built binary and speak to it over sockets. Each server takes a free port, and each test ends what
//! it started by its process id.

mod browser;
mod callers;
mod clients;
mod life;
mod limits;
mod log;
mod network;
mod requests;
mod soak;
mod start;
mod starved;
mod stream;
mod supervisor;
mod support;
