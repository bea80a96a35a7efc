"""A page from a table of SQLite. Each request opens the database, as is Django's default."""

from decimal import Decimal

from django.shortcuts import get_object_or_404, render

from shelf.models import Book


def index(request):
    return render(request, "shelf/index.html", {"books": Book.objects.all()[:20]})


def book(request, number):
    return render(request, "shelf/index.html", {"books": [get_object_or_404(Book, pk=number)]})


def warm(request):
    """The same page without the database, which is not there while a snapshot is taken."""
    # As text: compiled, but not sent.
    query = str(Book.objects.all()[:20].query)
    books = [Book(pk=n, name=query, author="Author", price=Decimal(n)) for n in range(3)]
    return render(request, "shelf/index.html", {"books": books})
