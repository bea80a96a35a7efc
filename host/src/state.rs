//! What `ctl` has changed, kept over a restart: a file, and beside it copies of
//! the apps that a rollback can return to.
//!
//! The file is read once, at the start. A file that can not be understood is
//! not an empty one: that would let a suspended tenant serve again.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use crate::error::UserError;

/// Size and time of a file; changes when the file does.
pub type Stamp = Option<(u64, SystemTime)>;

/// The stamp of the file at `path`; none if there is no file.
pub fn stamp(path: &Path) -> Stamp {
    let metadata = fs::metadata(path).ok()?;
    Some((metadata.len(), metadata.modified().ok()?))
}

/// What `ctl` has changed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct State {
    /// Tenants whose requests are refused.
    pub suspended: Vec<String>,
    /// Apps that were deployed in place of the configured ones.
    pub apps: BTreeMap<String, PathBuf>,
    /// Apps that were rolled back from.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub rejected: BTreeMap<String, Rejected>,
}

/// An app that was rolled back from. It is not loaded until its file changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rejected {
    /// The app, as the configuration or a deployment names it.
    pub app: PathBuf,
    /// Its file at that time.
    pub stamp: Stamp,
    /// What is loaded in its place.
    pub instead: PathBuf,
}

/// The state, and the file that it is kept in.
#[derive(Debug, Default)]
pub struct StateFile {
    path: Option<PathBuf>,
    /// Where copies of apps are kept, if they are.
    copies: Option<PathBuf>,
    current: Mutex<State>,
    /// Held while the file is changed.
    saving: Mutex<()>,
}

impl StateFile {
    /// Reads the file at `path`. With `copies`, apps are kept for rollbacks.
    ///
    /// # Errors
    ///
    /// A [`UserError`] if it is there but can not be understood.
    pub fn open(path: Option<PathBuf>, copies: bool) -> Result<StateFile> {
        let Some(path) = path else { return Ok(StateFile::default()) };
        let refuse = |reason: String| {
            UserError::new(format!("can not read the state file `{}`: {reason}", path.display())).remedy(
                "mend it, or remove it if no tenant is to stay suspended and no deployed app or rollback \
                 is to last",
            )
        };
        let current = match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text)
                // Else a list would do as well, by the order of the fields.
                .and_then(|object| serde_json::from_value(serde_json::Value::Object(object)))
                .map_err(|error| refuse(error.to_string()))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => State::default(),
            Err(error) => return Err(refuse(error.to_string()).into()),
        };
        let copies = copies.then(|| path.with_extension("apps"));
        Ok(StateFile { path: Some(path), copies, current: Mutex::new(current), saving: Mutex::default() })
    }

    /// What holds now.
    pub fn get(&self) -> State {
        lock(&self.current).clone()
    }

    /// Changes the state, and returns when that lasts. Blocks on the disk.
    ///
    /// # Errors
    ///
    /// If the file can not be written; then nothing changes.
    pub fn change(&self, change: impl FnOnce(&mut State)) -> Result<()> {
        let _one = lock(&self.saving);
        let mut state = self.get();
        change(&mut state);
        if state == *lock(&self.current) {
            return Ok(());
        }
        if let Some(path) = &self.path {
            let directory = directory_of(path);
            fs::create_dir_all(directory)
                .with_context(|| format!("failed to make `{}`", directory.display()))?;
            let mut file = tempfile::NamedTempFile::new_in(directory)
                .with_context(|| format!("failed to write in `{}`", directory.display()))?;
            file.write_all(&serde_json::to_vec_pretty(&state)?)?;
            file.as_file().sync_all()?;
            file.persist(path).with_context(|| format!("failed to write `{}`", path.display()))?;
            // The name too has to last.
            File::open(directory).and_then(|directory| directory.sync_all())?;
        }
        *lock(&self.current) = state;
        Ok(())
    }

    /// Keeps a copy of `app`, whose content has this `digest`, and returns
    /// where; none if copies are not kept, or the file has changed since it had
    /// this `stamp`. A link would not do: who writes over a file in place
    /// changes what all links show. Blocks on the disk.
    ///
    /// # Errors
    ///
    /// If the copy can not be made.
    pub fn keep(&self, app: &Path, digest: &str, before: Stamp) -> Result<Option<PathBuf>> {
        let Some(copies) = &self.copies else { return Ok(None) };
        let path = copies.join(format!("{digest}.wasm"));
        // A copy is complete, for it gets its name last.
        if path.exists() {
            return Ok(Some(path));
        }
        fs::create_dir_all(copies).with_context(|| format!("failed to make `{}`", copies.display()))?;
        let copy = tempfile::NamedTempFile::new_in(copies)?.into_temp_path();
        // Where the file system can, it shares the blocks.
        fs::copy(app, &copy).with_context(|| format!("failed to copy `{}`", app.display()))?;
        if stamp(app) != before {
            return Ok(None);
        }
        File::open(&copy)?.sync_all()?;
        copy.persist(&path)?;
        Ok(Some(path))
    }

    /// Whether `path` is a copy of ours.
    pub fn is_copy(&self, path: &Path) -> bool {
        self.copies.is_some() && path.parent() == self.copies.as_deref()
    }

    /// Removes all copies but those `in_use` and those that the state names.
    pub fn sweep(&self, in_use: &BTreeSet<PathBuf>) {
        let Some(entries) = self.copies.as_ref().and_then(|copies| fs::read_dir(copies).ok()) else { return };
        let state = self.get();
        let named = |path: &PathBuf| {
            state
                .apps
                .values()
                .chain(state.rejected.values().map(|rejected| &rejected.instead))
                .any(|app| app == path)
        };
        for path in entries.flatten().map(|entry| entry.path()) {
            if !in_use.contains(&path) && !named(&path) {
                // One that stays costs nothing but room.
                let _ = fs::remove_file(path);
            }
        }
    }
}

fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_changed_lasts_and_what_is_broken_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.state.json");
        let open = || StateFile::open(Some(path.clone()), false);
        open().unwrap().change(|state| state.suspended.push("a".into())).unwrap();
        assert_eq!(open().unwrap().get().suspended, ["a"]);
        // As older versions wrote it.
        fs::write(&path, "{\"suspended\": [\"b\"], \"apps\": {}}").unwrap();
        assert_eq!(open().unwrap().get().suspended, ["b"]);
        for broken in ["", "{", "[]", "{\"suspended\": true}", "{\"suspnded\": []}"] {
            fs::write(&path, broken).unwrap();
            let error = open().unwrap_err();
            assert!(error.is::<UserError>() && error.to_string().contains("x.state.json"), "{error}");
        }
        // What can not be written does not hold either.
        let below_file = directory.path().join("x.state.json/x.json");
        let state = StateFile { path: Some(below_file), ..StateFile::default() };
        assert!(state.change(|state| state.suspended.push("a".into())).is_err());
        assert_eq!(state.get(), State::default());
    }

    #[test]
    fn copies_outlive_what_they_were_made_from_as_long_as_they_are_needed() {
        let directory = tempfile::tempdir().unwrap();
        let app = directory.path().join("app.wasm");
        fs::write(&app, "first").unwrap();
        let state = StateFile::open(Some(directory.path().join("x.state.json")), true).unwrap();
        let copy = state.keep(&app, "1", stamp(&app)).unwrap().unwrap();
        assert!(state.is_copy(&copy) && !state.is_copy(&app));
        fs::write(&app, "the second").unwrap();
        assert_eq!(fs::read_to_string(&copy).unwrap(), "first");
        assert_eq!(state.keep(&app, "2", None).unwrap(), None, "it has changed since");
        state.sweep(&BTreeSet::from([copy.clone()]));
        assert!(copy.exists());
        state.change(|state| drop(state.apps.insert("a".into(), copy.clone()))).unwrap();
        state.sweep(&BTreeSet::new());
        assert!(copy.exists());
        state.change(|state| state.apps.clear()).unwrap();
        state.sweep(&BTreeSet::new());
        assert!(!copy.exists());
    }
}
