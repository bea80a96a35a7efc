//! Which WSGI callable is meant.

use std::fs;
use std::path::Path;

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

impl Target {
    /// The callable that `named` says, else the one that `directory` has.
    ///
    /// # Errors
    ///
    /// A [`UserError`] if `named` is not `module:callable`, its module is not
    /// there, or nothing usual is found.
    pub fn find(named: Option<&str>, directory: &Path) -> Result<Target> {
        match named {
            Some(named) => Target::parse(named, directory),
            None => Target::search(directory),
        }
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
        let root = project(&[]);
        let find = |named: &str| Target::find(Some(named), root.path()).unwrap();
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
            let error = Target::find(Some(named), root.path()).unwrap_err().to_string();
            assert!(error.contains(help), "{named}: {error}");
        }
    }

    #[test]
    fn the_usual_places_are_searched() {
        let find = |files: &[(&str, &str)]| Target::find(None, project(files).path());
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
