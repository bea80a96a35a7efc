//! Which WSGI callable is meant.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::Serialize;

use crate::error::UserError;

/// A WSGI callable to be found by the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Target {
    /// `module:callable`; without a callable the usual names are tried.
    Callable {
        /// Dotted name of the module.
        module: String,
        /// An attribute, or a call of a factory.
        callable: Option<String>,
    },
    /// The `WSGI_APPLICATION` of a Django project.
    Django {
        /// Dotted name of the settings module.
        django_settings: String,
    },
}

/// Where a callable usually is, best first.
const USUAL_MODULES: [&str; 4] = ["wsgi", "app", "application", "main"];

/// The package of the standard library that has applications.
const LIBRARY: &str = "wsgiref";
/// Modules that a message names at most.
const MAX_NAMED: usize = 8;

impl Target {
    /// The callable that `named` says, else the one that `directory` has. It
    /// must be there, unless there are `packages` that may have it.
    ///
    /// # Errors
    ///
    /// A [`UserError`] if `named` is not `module:callable`, its module is not
    /// there, or nothing usual is found.
    pub fn find(named: Option<&str>, directory: &Path, packages: Packages) -> Result<Target> {
        let Some(named) = named else { return Target::search(directory) };
        let target = Target::parse(named, directory)?;
        // Else it is too late to say so quickly.
        let elsewhere = packages == Packages::Some && !target.begins_in(directory);
        if !elsewhere && !target.may_be_in(directory) {
            return Err(target.missing(directory).into());
        }
        Ok(target)
    }

    /// Whether the module can be one below `root`, or one that is nowhere in files.
    pub fn may_be_in(&self, root: &Path) -> bool {
        let Target::Callable { module, .. } = self else { return true };
        let path = root.join(module.replace('.', "/"));
        let first = module.split('.').next().unwrap_or_default();
        first == LIBRARY || path.is_dir() || source(path).is_file()
    }

    /// Whether the module's first name is a module or a package of `root`, so
    /// that the rest can be nowhere else.
    fn begins_in(&self, root: &Path) -> bool {
        let Target::Callable { module, .. } = self else { return true };
        let path = root.join(module.split('.').next().unwrap_or_default());
        path.join("__init__.py").is_file() || source(path).is_file()
    }

    /// Why there is no such module in the project in `directory`.
    pub fn missing(&self, directory: &Path) -> UserError {
        let (module, what) = match self {
            // A file of another kind, for all we know.
            Target::Callable { module, callable: None } => (module, "neither a file nor a module"),
            Target::Callable { module, .. } => (module, "no module"),
            Target::Django { django_settings } => (django_settings, "no module"),
        };
        let error = UserError::new(format!("there is {what} `{module}` in `{}`", directory.display()));
        let found = modules(directory);
        error.remedy(if found.is_empty() {
            "name the project's directory with `--dir`".to_owned()
        } else {
            format!("write one of {}, or name the project's directory with `--dir`", found.join(", "))
        })
    }

    fn parse(named: &str, directory: &Path) -> Result<Target> {
        let (module, callable) = match named.split_once(':') {
            Some((module, callable)) => (module, Some(callable.to_owned())),
            None => (named, None),
        };
        let refuse = |reason: String, remedy: String| Err(UserError::new(reason).remedy(remedy).into());
        if let Some(stem) = module.strip_suffix(".py")
            && directory.join(module).is_file()
        {
            let module = stem.replace('/', ".");
            return refuse(format!("`{named}` names a file; a module is meant"), format!("write `{module}`"));
        }
        let is_name = |part: &str| {
            let mut letters = part.chars();
            letters.next().is_some_and(|first| first.is_alphabetic() || first == '_')
                && letters.all(|letter| letter.is_alphanumeric() || letter == '_')
        };
        if !module.split('.').all(is_name) {
            return refuse(
                format!("`{named}` is not a WSGI callable: `{module}` can not be the name of a module"),
                "write `module:callable`, for example `app:app` or `shop.wsgi:application`".into(),
            );
        }
        if callable.as_deref().is_some_and(|callable| callable.trim().is_empty()) {
            return refuse(
                format!("`{named}` has nothing behind the colon"),
                format!("write `{module}` or `{module}:app`"),
            );
        }
        Ok(Target::Callable { module: module.into(), callable })
    }

    fn search(directory: &Path) -> Result<Target> {
        if let Some(django_settings) = django_settings(&directory.join("manage.py")) {
            return Ok(Target::Django { django_settings });
        }
        for module in USUAL_MODULES {
            let is_module = directory.join(format!("{module}.py")).is_file()
                || directory.join(module).join("__init__.py").is_file();
            if is_module {
                return Ok(Target::Callable { module: module.into(), callable: None });
            }
        }
        Err(UserError::new(format!(
            "found no WSGI app in `{}`: neither wsgi.py, app.py, application.py or main.py, \
             nor the manage.py of a Django project",
            directory.display()
        ))
        .remedy("name the callable, for example `app:app`, or the project's directory with `--dir`")
        .into())
    }
}

/// Whether packages are installed beside the project.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packages {
    /// None.
    None,
    /// Some, whose modules are not known yet.
    Some,
}

/// The file of the module at `path`.
fn source(mut path: PathBuf) -> PathBuf {
    path.as_mut_os_string().push(".py");
    path
}

/// The modules and packages in `directory`, to choose from.
fn modules(directory: &Path) -> Vec<String> {
    let Ok(list) = fs::read_dir(directory) else { return Vec::new() };
    let mut found: Vec<_> = list
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            match name.strip_suffix(".py") {
                Some(module) => Some(format!("`{module}`")),
                None => entry.path().join("__init__.py").is_file().then(|| format!("`{name}`")),
            }
        })
        .collect();
    found.sort();
    found.truncate(MAX_NAMED);
    found
}

/// The settings module that a Django project's `manage.py` sets: the string
/// behind `"DJANGO_SETTINGS_MODULE",`.
fn django_settings(manage: &Path) -> Option<String> {
    let text = fs::read_to_string(manage).ok()?;
    let (_, rest) = text.split_once("DJANGO_SETTINGS_MODULE")?;
    let rest = rest.trim_start_matches(['"', '\'', ',', ' ', '\n', '\t', ']', '=']);
    let end = rest.find(['"', '\''])?;
    let name = &rest[..end];
    let is_dotted_name =
        !name.is_empty() && name.chars().all(|c| c.is_alphanumeric() || matches!(c, '_' | '.'));
    is_dotted_name.then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn project(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    fn callable(module: &str, callable: Option<&str>) -> Target {
        Target::Callable { module: module.into(), callable: callable.map(Into::into) }
    }

    #[test]
    fn a_name_is_taken_apart() {
        let root = project(&[("app.py", ""), ("a/b.py", "")]);
        let find = |named: &str| Target::find(Some(named), root.path(), Packages::None).unwrap();
        assert_eq!(find("app"), callable("app", None));
        assert_eq!(find("a.b:c.d"), callable("a.b", Some("c.d")));
        assert_eq!(find("app:create_app('x:y')"), callable("app", Some("create_app('x:y')")));
    }

    #[test]
    fn a_wrong_name_is_refused_with_the_right_one() {
        let root = project(&[("app.py", "")]);
        for (named, help) in [
            ("app.py", "write `app`"),
            ("app:", "`app:app`"),
            ("my-app", "module:callable"),
            ("", "module:callable"),
        ] {
            let error = Target::find(Some(named), root.path(), Packages::None).unwrap_err().to_string();
            assert!(error.contains(help), "{named}: {error}");
        }
    }

    #[test]
    fn a_module_that_is_nowhere_is_refused() {
        let root =
            project(&[("app.py", ""), ("shop/__init__.py", ""), ("space/site.py", ""), ("notes.txt", "")]);
        let find = |named: &str, packages| {
            Target::find(Some(named), root.path(), packages).map_err(|error| error.to_string())
        };
        for named in ["missing.txt", "app.wsm", "nosuch:app", "shop.wsgi:app", "notes.txt"] {
            let error = find(named, Packages::None).unwrap_err();
            assert!(error.contains("write one of `app`, `shop`"), "{named}: {error}");
        }
        assert!(find("missing.txt", Packages::None).unwrap_err().contains("neither a file nor a module"));
        for named in ["app.wsm", "shop.wsgi:app"] {
            find(named, Packages::Some).unwrap_err();
        }
        for named in ["installed.wsgi:app", "space.other:app"] {
            find(named, Packages::None).unwrap_err();
            find(named, Packages::Some).unwrap();
        }
        for named in ["app", "shop", "space.site:app", "wsgiref.simple_server:demo_app"] {
            find(named, Packages::None).unwrap();
        }
    }

    #[test]
    fn the_usual_places_are_searched() {
        let find = |files: &[(&str, &str)]| Target::find(None, project(files).path(), Packages::None);
        assert_eq!(find(&[("app.py", ""), ("wsgi.py", "")]).unwrap(), callable("wsgi", None));
        assert_eq!(find(&[("main/__init__.py", "")]).unwrap(), callable("main", None));
        for manage in [
            "os.environ.setdefault('DJANGO_SETTINGS_MODULE', 'shop.settings')",
            "os.environ.setdefault(\n    \"DJANGO_SETTINGS_MODULE\",\n    \"shop.settings\",\n)",
            "os.environ[\"DJANGO_SETTINGS_MODULE\"] = \"shop.settings\"",
        ] {
            let target = find(&[("manage.py", manage), ("app.py", "")]).unwrap();
            assert_eq!(target, Target::Django { django_settings: "shop.settings".into() });
        }
        assert!(find(&[("manage.py", "print()")]).unwrap_err().to_string().contains("found no WSGI app"));
    }
}
