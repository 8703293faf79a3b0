//! SSECommander: runs commands over HTTP and streams their output as Server-Sent Events, from the
//! standard library alone.
//!
//! The modules are in reading order. Data flows one way: from socket bytes to a request, past the
//! policy to a command, and back as output, events and bytes.
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

mod log;

mod clock;
#[allow(unsafe_code)]
mod sys;

use config::{Config, Exit, VERSION};
use refusal::error_text;
use std::{env, ffi::OsString, io, io::Write, net::TcpListener, process::ExitCode, thread};

fn main() -> ExitCode {
    let Err(Exit(status, why)) = start() else { return ExitCode::SUCCESS };
    // A closed stderr is no reason for another status.
    let _ = writeln!(io::stderr(), "ssecommander: {why}");
    ExitCode::from(status)
}

fn start() -> Result<(), Exit> {
    // Made into text with losses, an argument could name another file, or admit another command.
    let args: Result<Vec<_>, _> = env::args_os().skip(1).map(OsString::into_string).collect();
    let args = args.map_err(|wrong| Exit(2, format!("{wrong:?} is not UTF-8; see --help")))?;
    let text = match &args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["-h" | "--help"] => response::USAGE,
        ["-V" | "--version"] => VERSION,
        _ => {
            let config = Config::parse(&args)?;
            let url = format!("http://{}", config.address());
            let cannot = |error| Exit(1, format!("cannot serve on {url}: {}", error_text(&error)));
            return serve(config).map_err(cannot);
        }
    };
    let _ = write!(io::stdout(), "{text}");
    Ok(())
}

fn serve(config: Config) -> io::Result<()> {
    supervisor::split()?;
    let listener = TcpListener::bind(config.address())?;
    // With the port that was taken where 0 was asked for.
    let address = listener.local_addr()?;
    log::start(config.rules.token.as_ref())?;
    log::line(format_args!("listen address=http://{address}"));
    if !processes::is_known() {
        log::line(format_args!("listen why=\"without /proc, what a kill -9 leaves is not found\""));
    }
    // Nobody waits for a stdout that is a full pipe.
    thread::Builder::new().spawn(move || {
        let _ = writeln!(io::stdout(), "ssecommander listening on http://{address}");
    })?;
    server::serve(listener, config)?;
    // The log's thread still has lines to write.
    thread::sleep(log::LAST_MOMENT);
    Ok(())
}
