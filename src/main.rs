//! SSECommander: runs commands over HTTP and streams their output as Server-Sent Events, from the standard
//! library alone.
//!
//! The modules are in reading order. Data flows one way: from socket bytes to a request, past the policy to a
//! command, and back as output, events and bytes.
#![deny(unsafe_code)]

mod config;
mod supervisor;

mod server;

mod connection;

mod response;

mod policy;
mod request;
mod words;

mod refusal;

mod run;

mod child;
mod pipes;

mod output;
mod processes;

mod clock;
mod log;
#[allow(unsafe_code)]
mod sys;

use config::{Config, Exit, Wish};
use refusal::words_of;
use std::{io, io::Write, net::TcpListener, process::ExitCode, thread};

fn main() -> ExitCode {
    let Err(Exit(status, why)) = start() else {
        return ExitCode::SUCCESS;
    };
    // A closed stderr is no reason for another status.
    let _ = writeln!(io::stderr(), "ssecommander: {why}");
    ExitCode::from(status)
}

fn start() -> Result<(), Exit> {
    let config = match Wish::parse(std::env::args_os().skip(1))? {
        Wish::Serve(config) => config,
        Wish::Print(text) => {
            let _ = write!(io::stdout(), "{text}");
            return Ok(());
        }
    };
    let cannot = |what: &str, error| Exit(1, format!("cannot {what}: {}", words_of(&error)));
    supervisor::split().map_err(|error| cannot("start the server", error))?;
    let name = format!("listen on http://{}", config.address);
    let listener = TcpListener::bind(config.address).map_err(|error| cannot(&name, error))?;
    serve(listener, config).map_err(|error| cannot("serve", error))
}

fn serve(listener: TcpListener, config: Config) -> io::Result<()> {
    // With the port that was taken where 0 was asked for.
    let address = listener.local_addr()?;
    log::start(config.rules.token.as_ref())?;
    log::line(format_args!("listen address=http://{address}"));
    if !processes::is_known() {
        let why = "without /proc, what is left after a kill -9 of the server cannot be found";
        log::line(format_args!("listen why=\"{why}\""));
    }
    // Nobody waits for a stdout that is a full pipe.
    thread::Builder::new().spawn(move || {
        let _ = writeln!(io::stdout(), "ssecommander listening on http://{address}");
    })?;
    server::serve(listener, config)?;
    log::finish();
    Ok(())
}
