//! SSECommander: runs commands over HTTP and streams their output as Server-Sent Events, from the standard library alone.
//!
//! The modules are in reading order; data flows one way, from socket bytes to a request, past the policy to a command, and back as
//! output, events and bytes.
#![deny(unsafe_code)]

// Starting, and the path of a connection.
mod config;
mod server;

// A request, and whether it may be.
mod request;

mod policy;
mod words;

// Its answer, and a command's life.
mod response;
mod run;

mod child;
mod output;

// What the others stand on.
mod listener;

mod clock;
mod log;
#[allow(unsafe_code)]
mod sys;

use config::{Config, Invocation, Problem};
use listener::Listener;
use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    sys::normalise_process();
    match start() {
        Ok(()) => ExitCode::SUCCESS,
        Err(Problem::Usage(why)) => complain(&why, 2),
        Err(Problem::Start(why)) => complain(&why, 1),
    }
}

fn start() -> Result<(), Problem> {
    let token = std::env::var_os(config::TOKEN_VARIABLE);
    sys::remove_variable(config::TOKEN_VARIABLE);
    let config = match Config::parse(std::env::args_os().skip(1), token)? {
        Invocation::Help => return print(config::USAGE),
        Invocation::Version => return print(&format!("ssecommander {}\n", config::VERSION)),
        Invocation::Serve(config) => config,
    };
    let cannot = |error| Problem::Start(format!("cannot listen on {}: {error}", config.address));
    let listener = Listener::bind(&config.address).map_err(cannot)?;
    let address = listener.address().map_err(cannot)?;
    if let Some(token) = &config.policy.token {
        log::hide(token);
    }
    sys::catch_signals(&listener);
    let _ = print(&format!("ssecommander listening on {address}\n"));
    server::serve(&listener, config)
        .map_err(|error| Problem::Start(format!("cannot serve: {error}")))
}

/// A closed stdout is no reason to stop.
fn print(text: &str) -> Result<(), Problem> {
    let _ = std::io::stdout().write_all(text.as_bytes());
    Ok(())
}

fn complain(why: &str, status: u8) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "ssecommander: {why}");
    ExitCode::from(status)
}
