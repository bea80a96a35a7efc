from django.urls import path

from shelf import views

urlpatterns = [
    path("", views.index, name="index"),
    path("warm", views.warm),
    path("books/<int:number>", views.book, name="book"),
]
