//! Paths as a guest names them: relative to a directory it holds, parts
//! separated by slashes.

use wasmtime_wasi::p2::bindings::filesystem::types::ErrorCode;

/// Bytes of a path, as `PATH_MAX` of Linux.
const MAX_PATH: usize = 4096;
/// Bytes of a name, as `NAME_MAX` of Linux.
const MAX_NAME: usize = 255;

/// One part of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step<'a> {
    /// `.`, or the nothing behind a slash at the end: it must be a directory.
    Here,
    /// `..`
    Up,
    /// A name.
    Into(&'a str),
}

/// Refuses what is no path inside a directory.
///
/// # Errors
///
/// If it is empty, absolute, too long or has a NUL.
pub fn check(path: &str) -> Result<(), ErrorCode> {
    if path.is_empty() {
        Err(ErrorCode::NoEntry)
    } else if path.starts_with('/') {
        Err(ErrorCode::NotPermitted)
    } else if path.contains('\0') {
        Err(ErrorCode::Invalid)
    } else if path.len() >= MAX_PATH || path.split('/').any(|part| part.len() > MAX_NAME) {
        Err(ErrorCode::NameTooLong)
    } else {
        Ok(())
    }
}

/// The parts of `path`.
///
/// # Errors
///
/// As [`check`].
pub fn steps(path: &str) -> Result<impl Iterator<Item = Step<'_>>, ErrorCode> {
    check(path)?;
    Ok(path.split('/').map(|part| match part {
        "" | "." => Step::Here,
        ".." => Step::Up,
        name => Step::Into(name),
    }))
}

/// The directory that `path` is in (`.` for none), its name there, and whether
/// a slash says that it is a directory. For what makes, removes or moves a name.
///
/// # Errors
///
/// As [`check`], and if the last part is no name.
pub fn parent_and_name(path: &str) -> Result<(&str, &str, bool), ErrorCode> {
    check(path)?;
    let trimmed = path.trim_end_matches('/');
    let (parent, name) = trimmed.rsplit_once('/').unwrap_or((".", trimmed));
    match name {
        "." | ".." => Err(ErrorCode::Invalid),
        name => Ok((parent, name, trimmed.len() < path.len())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_taken_apart() {
        let parts: Vec<_> = steps("a//./../b/").unwrap().collect();
        assert_eq!(parts, [Step::Into("a"), Step::Here, Step::Here, Step::Up, Step::Into("b"), Step::Here]);
        assert_eq!(parent_and_name("a/b/c").unwrap(), ("a/b", "c", false));
        assert_eq!(parent_and_name("c//").unwrap(), (".", "c", true));
        assert_eq!(parent_and_name("a/.."), Err(ErrorCode::Invalid));
        let long = "n/".repeat(3000);
        for (path, error) in [
            ("", ErrorCode::NoEntry),
            ("/etc", ErrorCode::NotPermitted),
            ("a\0b", ErrorCode::Invalid),
            (&long, ErrorCode::NameTooLong),
            (&"n".repeat(256), ErrorCode::NameTooLong),
        ] {
            assert_eq!(check(path), Err(error), "{path}");
        }
    }
}
