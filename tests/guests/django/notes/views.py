from django.contrib import messages
from django.contrib.auth.decorators import login_required
from django.core.cache import cache
from django.db import connection, transaction
from django.db.models import Count, F
from django.http import FileResponse, HttpResponse, JsonResponse, StreamingHttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_POST
from django.views.generic import CreateView, DetailView, ListView

from .forms import NoteForm
from .models import Counter, Note, Tag


class NoteList(ListView):
    model = Note
    paginate_by = 5


class NoteDetail(DetailView):
    model = Note


class NoteCreate(CreateView):
    model = Note
    form_class = NoteForm

    @transaction.atomic
    def form_valid(self, form):
        note = form.save()
        for name in form.cleaned_data["tag_names"].split():
            note.tags.add(Tag.objects.get_or_create(name=name)[0])
        note.attributes = {"length": len(note.text), "tags": note.tags.count()}
        note.save()
        messages.success(self.request, f"“{note.title}” is kept.")
        return redirect(note)


@require_POST
@transaction.atomic
def count(request):
    """Adds one to the counter and one row to the notes."""
    counter, _ = Counter.objects.get_or_create(pk=1)
    Counter.objects.filter(pk=1).update(value=F("value") + 1)
    Note.objects.create(title=request.POST["title"])
    counter.refresh_from_db()
    return HttpResponse(str(counter.value))


def about(request):
    return render(request, "notes/about.html")


@login_required
def mine(request):
    request.session["visits"] = request.session.get("visits", 0) + 1
    return HttpResponse(f"{request.user.get_username()} {request.session['visits']}")


def statistics(request):
    tags = Tag.objects.annotate(used=Count("note")).order_by("name").values_list("name", "used")
    long = Note.objects.filter(attributes__length__gt=10).values_list("title", flat=True)
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM notes_note WHERE created > %s", ["2020-01-01"])
        recent = cursor.fetchone()[0]
    cache.add("asked", 0)
    return JsonResponse(
        {"tags": list(tags), "long": list(long), "recent": recent, "asked": cache.incr("asked")}
    )


@require_POST
def rolled_back(request):
    try:
        with transaction.atomic():
            Note.objects.create(title="Never kept")
            during = Note.objects.filter(title="Never kept").count()
            raise ValueError
    except ValueError:
        after = Note.objects.filter(title="Never kept").count()
    return HttpResponse(f"{during} {after}")


def stream(request):
    return StreamingHttpResponse((f"piece {number}\n" for number in range(3)), "text/plain")


def media(request, name):
    from django.core.files.storage import default_storage

    return FileResponse(default_storage.open(name))


def fail(request):
    secret = "a secret of the app"
    raise RuntimeError(secret)  # the line that fails
