//! Reads a component in text form from standard input and writes it to
//! standard output in binary form.

use std::io::{self, Read as _, Write as _};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut text = String::new();
    io::stdin().read_to_string(&mut text)?;
    Ok(io::stdout().write_all(&wat::parse_str(&text)?)?)
}
